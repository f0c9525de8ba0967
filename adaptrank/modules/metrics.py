"""Task metrics that torchmetrics does not have: exact match of an answer, and multiple choice."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|-?\.\d+")


class ExactMatch(Metric):
    """Share of generated texts whose final answer is the gold one, in [0, 1].

    The answer of a text is what follows its last "####", else its last "=", else all of it. Two numbers are equal when they
    differ by less than 1e-3 ("$1,200" is 1200); texts are equal but for case, spaces and a final full stop. A gold number
    against a sentence is compared with the sentence's last number.
    """

    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], answers: Sequence[str]) -> None:
        """Compare texts with as many gold answers."""
        self.correct += sum(
            is_match(text, answer) for text, answer in zip(texts, answers, strict=True)
        )
        self.total += len(answers)

    def compute(self) -> Tensor:
        return self.correct / self.total


def is_match(text: str, answer: str) -> bool:
    """Whether the final answer of a generated text is the gold answer."""
    found = text
    for mark in ("####", "="):
        if mark in text:
            found = text.rsplit(mark, 1)[1]
            break
    gold, said = _number(answer), _number(found)
    if gold is not None:
        if said is None and (numbers := _NUMBER.findall(found)):
            said = _number(numbers[-1])
        return said is not None and abs(gold - said) < 1e-3
    return _plain(found) == _plain(answer)


def _number(text: str) -> float | None:
    bare = text.strip().rstrip(".").lstrip("$").rstrip("%").replace(",", "").strip()
    return float(bare) if _NUMBER.fullmatch(bare) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").strip().casefold()


class MultipleChoice(Metric):
    """Share of examples whose right choice has the highest log-probability, in [0, 1].

    Args:
        normalize: divide each choice's summed log-probability by its length in characters.
    """

    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, log_probabilities: Tensor, characters: Tensor, group: Tensor, target: Tensor
    ) -> None:
        """Score one batch.

        Args:
            log_probabilities: (rows,) summed over the tokens of each choice.
            characters: (rows,) length of each choice.
            group: (rows,) which example a row belongs to, 0 to B - 1.
            target: (B,) index of the right choice among its example's rows.
        """
        scores = log_probabilities / characters if self.normalize else log_probabilities
        for example, right in enumerate(target.tolist()):
            self.correct += int(scores[group == example].argmax()) == right
        self.total += len(target)

    def compute(self) -> Tensor:
        return self.correct / self.total
