"""Metrics that torchmetrics lacks: exact match of an answer, and multiple choice."""

import re
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

GOLD_MARK = "####"
"""Mark in front of the final answer of a solution, as in GSM8K."""
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|-?\.\d+")


class ShareOfTexts(Metric):
    """Share of generated texts that match the text that was wanted, in [0, 1].

    A subclass says in `matches` when a text is right.
    """

    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    @abstractmethod
    def matches(self, text: str, wanted: str) -> bool:
        """Tell whether a generated text is right."""

    def update(self, texts: Sequence[str], wanted: Sequence[str]) -> None:
        """Compare generated texts with the wanted ones, one for each text."""
        for text, right in zip(texts, wanted, strict=True):
            self.correct += self.matches(text, right)
        self.total += len(wanted)

    def compute(self) -> Tensor:
        return self.correct / self.total


class ExactMatch(ShareOfTexts):
    """Share of generated texts whose final answer is the gold one, in [0, 1].

    The answer of a text is the part after its last "####", else the part after its last "=", else
    the whole text. The gold answer is the part after its last "####", as in GSM8K, else the whole.
    Two numbers match if they differ by less than 1e-3, and "$1,200" is 1200. Two texts match if
    they differ in case, spaces and a final full stop only. A text that is the whole gold text
    matches, whatever marks it has. If the gold answer is a number and the text's answer is a
    sentence, the last number of the sentence is compared.
    """

    def matches(self, text: str, wanted: str) -> bool:
        return is_match(text, wanted)


def is_match(text: str, answer: str) -> bool:
    """Tell whether the final answer of a generated text is the gold answer."""
    if _normalize(text) == _normalize(answer):
        return True
    final = _final_answer(text)
    # An equation or a query has "=" inside of its answer, so only "####" ends a solution here.
    gold = answer.rpartition(GOLD_MARK)[2]
    gold_number = _parse_number(gold)
    if gold_number is None:
        return _normalize(final) == _normalize(gold)
    number = _parse_number(final)
    if number is None:
        numbers = NUMBER.findall(final)
        number = _parse_number(numbers[-1]) if numbers else None
    return number is not None and abs(gold_number - number) < 1e-3


def _final_answer(text: str) -> str:
    """Return the part of a text that holds its answer."""
    for mark in (GOLD_MARK, "="):
        if mark in text:
            return text.rsplit(mark, 1)[1]
    return text


def _parse_number(text: str) -> float | None:
    """Return the number that the whole text spells, without units of currency, or None."""
    bare = text.strip().rstrip(".").lstrip("$").rstrip("%").replace(",", "").strip()
    return float(bare) if NUMBER.fullmatch(bare) else None


def _normalize(text: str) -> str:
    """Return the text without differences in case, spaces and a final full stop."""
    return " ".join(text.split()).rstrip(".").strip().casefold()


class MultipleChoice(Metric):
    """Share of examples whose correct choice has the highest log-probability, in [0, 1].

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
            log_probabilities: (rows,) log-probability of each choice, summed over its tokens.
            characters: (rows,) length of each choice in characters.
            group: (rows,) index of the example that a row belongs to, 0 to B - 1.
            target: (B,) index of the correct choice among its example's rows.
        """
        scores = log_probabilities / characters if self.normalize else log_probabilities
        for example, correct_choice in enumerate(target.tolist()):
            chosen = int(scores[group == example].argmax())
            self.correct += chosen == correct_choice
        self.total += len(target)

    def compute(self) -> Tensor:
        return self.correct / self.total
