"""The choices of a question: what a model decides by their scores, and what metrics read."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.modules.batch_keys import IGNORED
from adaptrank.modules.problems import Decision, drawn_outputs
from adaptrank.modules.standard_metrics import FOR_CHOICES, Standard


class Choices(Decision):
    """One right choice for each question. Scores are (N, C), and -inf where there is no choice.

    To metrics each place in the list of choices is a class, and a missing choice has the
    probability 0.

    Args:
        labels: most choices of a question, L. With 0 it is not known, and metrics with a number of
            classes do not fit.
    """

    key = "multiple_choice"
    default_metrics = ("accuracy", "calibration_error")
    standard: ClassVar[Mapping[str, Standard]] = FOR_CHOICES

    @property
    def targets(self) -> str:
        return f"{self.labels} choices" if self.labels else "choices"

    def loss(self, scores: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Return the mean cross entropy over the labelled rows, which is zero if there is none.

        Args:
            scores: (N, C).
            labels: (N,) index of the right choice, or -100.
            count: number of labelled rows, ().

        Raises:
            UserError: if there is not one label for each row.
        """
        if labels.dim() != 1 or len(labels) != len(scores):
            raise UserError(
                f"MultipleChoice needs the index of the right choice for each of {len(scores)} "
                f"rows, and got labels of shape {tuple(labels.shape)}."
            )
        loss = F.cross_entropy(scores, labels, ignore_index=IGNORED)
        return torch.where(count > 0, loss, 0 * scores.max())

    def probabilities(self, output: Tensor) -> Tensor:
        missing = self.labels - output.shape[-1]
        return F.pad(output.softmax(-1), (0, max(missing, 0)))

    def decide(self, output: Tensor) -> Tensor:
        return output.argmax(-1)

    def example(self) -> tuple[Tensor, Tensor]:
        output = drawn_outputs(self.labels)
        return output, torch.arange(len(output)) % self.labels
