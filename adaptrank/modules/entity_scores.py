"""Entities in tagged sentences, and precision, recall and F1 of them.

A span of words is an entity if its tags say so by one of the schemes

- BIO (IOB2): B-X begins an entity of kind X, and I-X goes on with it. IOB1 is read too, where an
  entity begins with I-X, as are the schemes with ends and single words, IOBES (E-X, S-X) and BILOU
  (L-X, U-X).
- IO: tags without a letter in front, such as X. Neighbours of one kind are one entity.

Where tags contradict the scheme, the rules are those of the CoNLL evaluation script: an I-X after
another kind, or after no entity, begins one. An entity is right if its kind, its first and its last
word are.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from adaptrank.modules.batch_keys import IGNORED

Tag = tuple[str, str]
"""Letter of a tag (B, I, E, S, L, U, O), and the kind of its entity, "" for O."""

OUTSIDE: Tag = ("O", "")

PREFIXED = re.compile(r"([BIESLUM])[-_](.+)")
"""A tag that says where in an entity its word stands. M is a middle, as in BMES."""

Span = tuple[str, int, int]
"""Kind of an entity, its first word, and the word after its last."""


def has_entities(names: Sequence[str]) -> bool:
    """Tell whether names of classes tag entities: one of them is O, or has a letter in front."""
    return "O" in names or any(PREFIXED.fullmatch(name) for name in names)


def read_tag(name: str) -> Tag:
    """Return the letter and the kind of a tag. One without a letter goes on with its entity."""
    if name == "O":
        return OUTSIDE
    match = PREFIXED.fullmatch(name)
    if match is None:
        return "I", name
    return ("I" if match[1] == "M" else match[1]), match[2]


def entity_spans(tags: Sequence[Tag]) -> set[Span]:
    """Return the entities of a sentence."""
    spans: set[Span] = set()
    start: int | None = None
    letter, kind = OUTSIDE
    for position, (next_letter, next_kind) in enumerate([*tags, OUTSIDE]):
        is_border = next_letter in ("B", "S", "U") or letter in ("E", "L", "S", "U")
        if is_border or next_kind != kind:
            if start is not None:
                spans.add((kind, start, position))
            start = position if next_kind else None
        letter, kind = next_letter, next_kind
    return spans


class EntityScores(Metric):
    """Precision, recall and F1 of entities, over the entities of all sentences (micro average).

    Args:
        names: name of each class.
    """

    higher_is_better = True
    full_state_update = False
    right: Tensor
    predicted: Tensor
    expected: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.tags = [read_tag(name) for name in names]
        for state in ("right", "predicted", "expected"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Compare the entities of sentences.

        Args:
            preds: (B, W) predicted class of each word.
            target: (B, W) class of each word, -100 for words that do not count.
        """
        for predicted, wanted in zip(preds.tolist(), target.tolist(), strict=True):
            counted = [k for k, tag in enumerate(wanted) if tag != IGNORED]
            found = entity_spans([self.tags[predicted[k]] for k in counted])
            true = entity_spans([self.tags[wanted[k]] for k in counted])
            self.right += len(found & true)
            self.predicted += len(found)
            self.expected += len(true)

    def compute(self) -> dict[str, Tensor]:
        """Return precision, recall and F1, each 0 where there is no entity to divide by."""
        precision = self.right / self.predicted.clamp(min=1)
        recall = self.right / self.expected.clamp(min=1)
        f1 = 2 * self.right / (self.predicted + self.expected).clamp(min=1)
        return {"precision": precision, "recall": recall, "f1": f1}
