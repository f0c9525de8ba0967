"""Kinds of labels: their loss, what a model decides by its output, and a model that guesses."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.modules.batch_keys import IGNORED, count_supervised
from adaptrank.modules.label_counts import LabelCounts, LabelShares, LabelSpread
from adaptrank.modules.standard_metrics import FOR_CLASSES, FOR_LABELS, FOR_NUMBERS, Standard

DIGITS = 6
"""Decimal places of a probability in a prediction."""

ROWS_FOR_CLASS, MOST_ROWS = 4, 256
"""Rows on which a metric is tried, for each class and at most."""


class Decision(ABC):
    """Rule that turns the output of a head into the probabilities and decisions of the metrics.

    The letter N counts the targets of a batch: its rows, or the tokens of all rows.

    Args:
        labels: number of outputs for each target, L.
    """

    key: ClassVar[str]
    """Name of the kind of labels."""
    default_metrics: ClassVar[Sequence[str]]
    standard: ClassVar[Mapping[str, Standard]]
    """Names of the metrics that fit."""

    def __init__(self, labels: int) -> None:
        self.labels = labels

    @property
    def targets(self) -> str:
        """Description of the targets, for errors."""
        return f"{self.labels} label(s)"

    @abstractmethod
    def probabilities(self, output: Tensor) -> Tensor:
        """Return the probability of each class, (N, L), or the values of a regression."""

    @abstractmethod
    def decide(self, output: Tensor) -> Tensor:
        """Return what the model predicts, in the form of the labels."""

    @abstractmethod
    def example(self) -> tuple[Tensor, Tensor]:
        """Return drawn outputs and labels of some targets, on which a metric is tried."""


class Problem(Decision):
    """Kind of labels that a head predicts. Its `key` is the value of the key `problem`."""

    def shape_output(self, logits: Tensor) -> Tensor:
        """Return the output of a head (N, L) in the shape of the labels' losses."""
        return logits

    @abstractmethod
    def loss(self, output: Tensor, labels: Tensor, count: Tensor, weights: Tensor | None) -> Tensor:
        """Return the mean loss over the targets, which is zero if there is none.

        Args:
            output: output of the head.
            labels: labels of the batch.
            count: result of `count`, ().
            weights: (L,) weight of each class, at least 1 unless it is 0, or None.
        """

    def count(self, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the number of targets, (), or with weights the sum of their weights."""
        return count_supervised(labels)

    def read_targets(self, labels: Tensor) -> Tensor:
        """Return labels in the dtype that metrics read."""
        return labels

    def labelled(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs and the labels of the targets that metrics count."""
        return output, labels

    @abstractmethod
    def statistics(self) -> LabelCounts | LabelShares | LabelSpread:
        """Return a metric of the labels, which gives the figures of a model that guesses."""

    @abstractmethod
    def describe(self, output: Tensor, names: Sequence[str] | None) -> list[Any]:
        """Return a prediction for each row, as plain values for a line of JSON.

        Args:
            output: output of the head.
            names: (L,) names of the classes, or None.
        """


class SingleLabel(Problem):
    """One class for each target. Labels (N,) are indices, and -100 is no label.

    With weights w the loss is that of torch, sum w_y l / sum w_y.
    """

    key = "single_label"
    default_metrics = ("accuracy",)
    standard = FOR_CLASSES

    def loss(self, output: Tensor, labels: Tensor, count: Tensor, weights: Tensor | None) -> Tensor:
        loss = F.cross_entropy(output, labels, weight=weights, ignore_index=IGNORED)
        return torch.where(count > 0, loss, 0 * output.sum())

    def count(self, labels: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None:
            return count_supervised(labels)
        of_targets = weights.index_select(0, labels.clamp(min=0).flatten())
        return (of_targets * (labels.flatten() != IGNORED)).sum()

    def labelled(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        has_label = labels != IGNORED
        return output[has_label], labels[has_label]

    def probabilities(self, output: Tensor) -> Tensor:
        return output.softmax(-1)

    def decide(self, output: Tensor) -> Tensor:
        return output.argmax(-1)

    def statistics(self) -> LabelCounts:
        return LabelCounts(self.labels)

    def example(self) -> tuple[Tensor, Tensor]:
        output = drawn_outputs(self.labels)
        return output, torch.arange(len(output)) % self.labels

    def describe(self, output: Tensor, names: Sequence[str] | None) -> list[Any]:
        predictions = []
        chosen: list[int] = self.decide(output).tolist()
        for index, row in zip(chosen, self.probabilities(output).tolist(), strict=True):
            name = {} if names is None else {"name": names[index]}
            predictions.append({"label": index, **name, "probabilities": _by_name(row, names)})
        return predictions


class MultiLabel(Problem):
    """Any number of classes for each row. Labels (N, L) are 0 or 1, and -100 is not known.

    The loss is the binary cross entropy, the mean over all rows and classes. A weight multiplies
    the loss of a class where it is 1, as `pos_weight` of torch does.

    Args:
        labels: number of classes, L.
        thresholds: (L,) probabilities from which on a class is predicted, or one for all.
    """

    key = "multi_label"
    default_metrics = ("f1", "exact_match")
    standard = FOR_LABELS

    def __init__(self, labels: int, thresholds: Sequence[float] = (0.5,)) -> None:
        super().__init__(labels)
        self.thresholds = list(thresholds)

    def loss(self, output: Tensor, labels: Tensor, count: Tensor, weights: Tensor | None) -> Tensor:
        if labels.shape != output.shape:
            raise UserError(
                f"Several labels for each row need a 0 or a 1 for each class, "
                f"{tuple(output.shape)}, and the labels have the shape {tuple(labels.shape)}. Set "
                "`multi_label: true` in the data, or leave model.problem out."
            )
        losses = F.binary_cross_entropy_with_logits(
            output,
            labels.clamp(min=0).to(output.dtype),
            weight=(labels >= 0).to(output.dtype),
            pos_weight=weights,
            reduction="sum",
        )
        return losses / count.clamp(min=1)

    def count(self, labels: Tensor, weights: Tensor | None) -> Tensor:
        return (labels >= 0).sum()

    def read_targets(self, labels: Tensor) -> Tensor:
        return labels.long()

    def labelled(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        is_known = (labels >= 0).all(-1)
        return output[is_known], labels[is_known]

    def probabilities(self, output: Tensor) -> Tensor:
        return output.sigmoid()

    def decide(self, output: Tensor) -> Tensor:
        limits = torch.tensor(self.thresholds, dtype=output.dtype, device=output.device)
        return (self.probabilities(output) >= limits).long()

    def statistics(self) -> LabelShares:
        return LabelShares(self.labels)

    def example(self) -> tuple[Tensor, Tensor]:
        output = drawn_outputs(self.labels)
        places = torch.arange(len(output))[:, None] + torch.arange(self.labels)
        return output, places % 2

    def describe(self, output: Tensor, names: Sequence[str] | None) -> list[Any]:
        predictions = []
        chosen: list[list[int]] = self.decide(output).tolist()
        for flags, row in zip(chosen, self.probabilities(output).tolist(), strict=True):
            indices = [index for index, flag in enumerate(flags) if flag]
            named = {} if names is None else {"names": [names[index] for index in indices]}
            predictions.append({"labels": indices, **named, "probabilities": _by_name(row, names)})
        return predictions


class Regression(Problem):
    """One number for each row, labels (N,), or several, labels (N, L). The loss is squared."""

    key = "regression"
    default_metrics = ("pearson", "spearman", "rmse")
    standard = FOR_NUMBERS

    def shape_output(self, logits: Tensor) -> Tensor:
        return logits.squeeze(-1) if self.labels == 1 else logits

    def loss(self, output: Tensor, labels: Tensor, count: Tensor, weights: Tensor | None) -> Tensor:
        if labels.shape != output.shape:
            raise UserError(
                f"A regression needs one label for each row, {tuple(output.shape)}, and got "
                f"labels of shape {tuple(labels.shape)}. Squeeze them in the collate_fn."
            )
        return F.mse_loss(output, labels.to(output.dtype))

    def read_targets(self, labels: Tensor) -> Tensor:
        return labels.float()

    def probabilities(self, output: Tensor) -> Tensor:
        return output

    def decide(self, output: Tensor) -> Tensor:
        return output

    def statistics(self) -> LabelSpread:
        return LabelSpread(self.labels)

    def example(self) -> tuple[Tensor, Tensor]:
        output = self.shape_output(drawn_outputs(self.labels))
        return output, output.flip(0)

    def describe(self, output: Tensor, names: Sequence[str] | None) -> list[Any]:
        values: list[Any] = output.tolist()
        if self.labels == 1 or names is None:
            return values
        return [dict(zip(names, row, strict=True)) for row in values]


def drawn_outputs(labels: int) -> Tensor:
    """Return the same random outputs at each call, (N, labels), without PyTorch's generator."""
    generator = torch.Generator().manual_seed(0)
    rows = min(ROWS_FOR_CLASS * labels, MOST_ROWS)
    return torch.randn(rows, labels, generator=generator)


def _by_name(row: Sequence[float], names: Sequence[str] | None) -> Any:
    """Return probabilities under the names of their classes, or as a list without names."""
    rounded = [round(value, DIGITS) for value in row]
    return rounded if names is None else dict(zip(names, rounded, strict=True))
