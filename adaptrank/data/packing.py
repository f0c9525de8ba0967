"""Pack several examples into each row of a batch.

The examples of a row are told apart by position ids that begin again with each of them. The first
token of an example has no label, because no other example predicts it.
"""

import logging
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from adaptrank._errors import UserError, UserTypeError
from adaptrank.data.collate import IGNORED, Batch, pad
from adaptrank.data.lazy import LazyExamples
from adaptrank.data.seeding import seeded_random

log = logging.getLogger(__name__)

Example = dict[str, Any]

WINDOW = 8192
"""Examples that are packed together. More fill rows no better, and fewer make less random rows."""


def check_packing(packing: Any, group_by_length: bool) -> None:
    """Raise if `packing` is no boolean, or stands beside `group_by_length`.

    Raises:
        UserError: saying which of the two to leave out.
    """
    if not isinstance(packing, bool):
        raise UserTypeError(f"packing={packing!r} is neither true nor false.")
    if packing and group_by_length:
        raise UserError(
            "Packed rows are of one length, so group_by_length has nothing to group. Leave out "
            "`packing` or `group_by_length`."
        )


def pack(lengths: Sequence[int], size: int, seed: int = 0) -> list[list[int]]:
    """Return rows of examples, each of at most `size` tokens: [row][place] -> index of the example.

    The examples are shuffled by the seed and packed window by window, best fit decreasing: each
    example, the longest first, goes into the fullest row that has space for it. Every example is in
    one row.

    Args:
        lengths: (n,) tokens of each example, none above `size`.
        size: most tokens of a row.
        seed: seed of the order.
    """
    order = list(range(len(lengths)))
    seeded_random("packing", seed).shuffle(order)
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        rows += _best_fit_decreasing(order[start : start + WINDOW], lengths, size)
    return rows


def _best_fit_decreasing(
    indices: Sequence[int], lengths: Sequence[int], size: int
) -> list[list[int]]:
    """Return rows of the examples with these indices."""
    rows: list[list[int]] = []
    # Space that is left -> rows that have it. Bit k of `spaces` is set if some row has k left.
    with_space: dict[int, list[int]] = {}
    spaces = 0
    for index in sorted(indices, key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = spaces >> length << length
        if fitting:
            space = (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = size, len(rows)
            rows.append([])
        rows[row].append(index)
        rest = space - length
        if rest:
            with_space.setdefault(rest, []).append(row)
            spaces |= 1 << rest
    return rows


class PackedExamples(Sequence[Example]):
    """Rows of packed examples, which are joined when they are read.

    A row has `input_ids`, `labels` and `position_ids`, each (L,).

    Args:
        examples: the examples, each with `input_ids` and `labels`.
        rows: indices of the examples in each row (see `pack`).
    """

    def __init__(self, examples: Sequence[Example], rows: list[list[int]]) -> None:
        self.examples = examples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return joined([self.examples[k] for k in self.rows[index]])


def pack_examples(examples: Sequence[Example], size: int, seed: int) -> PackedExamples:
    """Pack the examples of a training split, and log how full the rows are.

    Args:
        examples: the examples.
        size: most tokens of a row.
        seed: seed of the rows.

    Raises:
        UserError: if the examples are tokenized when they are read.
    """
    if isinstance(examples, LazyExamples):
        raise UserError(
            f"packing needs the length of all {len(examples)} examples, which are tokenized only "
            "when they are read. Leave it out, or set `limit_train`."
        )
    lengths = [len(example["input_ids"]) for example in examples]
    rows = pack(lengths, size, seed)
    log.info(
        "Packing puts %d examples into %d rows of %d tokens, which are %.1f%% full.",
        len(lengths),
        len(rows),
        size,
        100 * sum(lengths) / (len(rows) * size),
    )
    return PackedExamples(examples, rows)


def joined(examples: Sequence[Example]) -> Example:
    """Return one row of examples, one after the other."""
    labels = []
    positions = []
    for example in examples:
        own_labels = example["labels"].clone()
        own_labels[:1] = IGNORED
        labels.append(own_labels)
        positions.append(torch.arange(len(own_labels), dtype=torch.int32))
    return {
        "input_ids": torch.cat([example["input_ids"] for example in examples]),
        "labels": torch.cat(labels),
        "position_ids": torch.cat(positions),
    }


def packed_batch(rows: Sequence[Example], pad_id: int) -> Batch:
    """Return a batch of packed rows: input_ids, labels and position_ids, each (B, L).

    The padding of a row is one more example without labels, so no mask is needed.
    """
    ids = [row["input_ids"] for row in rows]
    longest = max(map(len, ids))
    return {
        "input_ids": pad(ids, pad_id),
        "labels": pad([row["labels"] for row in rows], IGNORED),
        "position_ids": torch.stack([_padded(row["position_ids"], longest) for row in rows]),
    }


def _padded(positions: Tensor, length: int) -> Tensor:
    """Return positions with those of the padding, which begin at 0, too."""
    rest = torch.arange(length - len(positions), dtype=torch.long)
    return torch.cat([positions.long(), rest])
