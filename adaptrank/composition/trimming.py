"""Trim changes to their largest entries: layer by layer, or over all layers of a task at once.

The k largest entries of a whole task vector are, in each layer, the largest entries of that layer.
So trimming over all layers is trimming layer by layer, once it is known how many entries of each
layer stay. These numbers come from a selection by counting. The bit pattern of a magnitude is read
digit by digit, the highest digit first. Each pass over the layers counts how often each digit
occurs among the entries that have the digits found so far. The result is exact, and the matrices
of no more than two layers are in memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from adaptrank._errors import RunError

DIGITS = (18, 16, 15, 14)
"""Bits of each digit of a float64 without its sign. The first two hold the whole of a float32."""

CHUNK = 1 << 18
"""Number of entries that are looked at in float64 at once."""

TaskMatrices = Sequence[Tensor | None]
"""Matrices that are trimmed in one layer, one for each task, or None for a task without one."""

Pass = Callable[[], Iterable[tuple[str, TaskMatrices]]]
"""A pass over all layers: yields (path, matrices), in the same order at each call."""


@dataclass(frozen=True)
class LayerTrim:
    """The part of one layer in a trim over all layers.

    Args:
        kept: number of entries that stay, of each change of the layer.
        balance: how many more entries of the whole elected vector are positive than negative.
    """

    kept: Sequence[int]
    balance: int = 0


def largest(D: Tensor, count: int) -> Tensor:
    """Zero all but the `count` largest entries by |value|.

    Of equal entries the one with the lower index stays.
    """
    if count >= D.numel():
        return D
    if count <= 0:
        return torch.zeros_like(D)
    magnitudes = D.abs().flatten()
    threshold = magnitudes.kthvalue(D.numel() - count + 1).values
    stays = magnitudes > threshold
    equal = magnitudes == threshold
    room = count - int(stays.sum())
    if int(equal.sum()) > room:
        equal &= equal.cumsum(0) <= room
    return D * (stays | equal).view_as(D)


def kept_of(size: int, density: float) -> int:
    """Return how many of `size` entries stay: ceil(density * size)."""
    # In binary, 0.07 * 100 is above 7.
    return min(size, math.ceil(Fraction(str(density)) * size))


def kept_in_layers(layers: Pass, tasks: int, density: float) -> dict[str, list[int]]:
    """Return how many entries of each layer are among the largest of their whole task vector.

    Exactly ceil(density * entries of the task) entries of each task stay. Of equal entries those of
    an earlier layer stay, then those with a lower index.

    Args:
        layers: a pass over all layers. There are two passes to find the thresholds of float32
            matrices, or four if there are float64 ones, and one to count the entries above them.
        tasks: number of tasks.
        density: fraction of the entries of a task that stays, in (0, 1].
    Returns:
        {path: kept entries of each matrix that is not None}.
    """
    searches = [_Search() for _ in range(tasks)]
    for level in range(len(DIGITS)):
        _count_digits(searches, layers(), level)
        for search in searches:
            if not search.finished:
                search.close(level, density)
        if all(search.finished for search in searches):
            break
    return {path: _take(searches, matrices) for path, matrices in layers()}


def _count_digits(
    searches: Sequence["_Search"], layers: Iterable[tuple[str, TaskMatrices]], level: int
) -> None:
    for _, matrices in layers:
        for search, matrix in zip(searches, matrices, strict=True):
            if matrix is not None and not search.finished:
                search.count(matrix, level)


def _take(searches: Sequence["_Search"], matrices: TaskMatrices) -> list[int]:
    """Return how many entries of each matrix of the next layer stay."""
    pairs = zip(searches, matrices, strict=True)
    return [search.take(matrix) for search, matrix in pairs if matrix is not None]


class _Search:
    """Search for the magnitude at which one task vector is trimmed."""

    def __init__(self) -> None:
        self.finished = False
        self._size = 0
        self._wanted = 0
        self._is_wide = False  # whether a matrix has more bits than float32
        self._prefix = 0  # digits found so far, in the end the bits of the threshold
        self._above = 0  # entries larger than all that have these digits
        self._equal = 0  # entries equal to the threshold that still stay
        self._counts = torch.zeros(1 << DIGITS[0], dtype=torch.int64)

    def count(self, matrix: Tensor, level: int) -> None:
        """Count the digit of each entry that has the digits found so far."""
        if level == 0:
            self._size += matrix.numel()
            self._is_wide = self._is_wide or matrix.dtype == torch.float64
        rest = sum(DIGITS[level + 1 :])
        size = 1 << DIGITS[level]
        for bits in _bit_patterns(matrix):
            selected = bits[bits >> (rest + DIGITS[level]) == self._prefix]
            digits = (selected >> rest) & (size - 1)
            self._counts += digits.bincount(minlength=size).cpu()

    def close(self, level: int, density: float) -> None:
        """Choose the digit that the smallest kept entry has."""
        if level == 0:
            self._wanted = kept_of(self._size, density)
        if not self._wanted:
            self.finished = True
            return
        # at_least[d]: entries whose digit is d or more.
        at_least = self._counts.flip(0).cumsum(0).flip(0)
        candidates = (at_least >= self._wanted - self._above).nonzero()
        if not len(candidates):
            raise RunError(
                "The changes of the adapters differ from one pass over the layers to the next; "
                "compose on the CPU, or with trim='layer'."
            )
        digit = int(candidates[-1])
        self._above += int(at_least[digit] - self._counts[digit])
        self._prefix = (self._prefix << DIGITS[level]) | digit
        rest = DIGITS[level + 1 :]
        # The rest of a float32's bits are zero after the second digit.
        self.finished = not rest or (level == 1 and not self._is_wide)
        if self.finished:
            self._prefix <<= sum(rest)
            self._equal = self._wanted - self._above
        else:
            self._counts = torch.zeros(1 << rest[0], dtype=torch.int64)

    def take(self, matrix: Tensor) -> int:
        """Return how many entries of the next layer stay."""
        above = equal = 0
        for bits in _bit_patterns(matrix):
            above += int((bits > self._prefix).sum())
            equal += int((bits == self._prefix).sum())
        equal = min(equal, self._equal)
        self._equal -= equal
        return above + equal


def _bit_patterns(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the magnitudes of a matrix as whole numbers of the same order, chunk by chunk."""
    for chunk in torch.split(matrix.flatten(), CHUNK):
        bits: Tensor = chunk.double().abs().view(torch.int64)
        yield bits
