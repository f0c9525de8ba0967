"""Rows, examples and orders that are computed when they are read.

Their memory does not depend on their number.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from adaptrank.data.seeding import seeded_random

ROUNDS = 4
"""Rounds of the Feistel network."""

MASK = 2**64 - 1


class Computed(Sequence[Any]):
    """A sequence whose items are computed from their index.

    Args:
        size: number of items.
        compute: function index from 0 -> item.
    """

    def __init__(self, size: int, compute: Callable[[int], Any]) -> None:
        self.size = size
        self.compute = compute

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.compute(k) for k in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"{index} is not among {self.size} items")
        return self.compute(index % self.size)


class Permutation(Computed):
    """A random order of the integers below n, in constant memory.

    A Feistel network permutes the integers below the next power of 4. A result that is not below n
    is permuted again, until one is.

    Args:
        n: number of integers.
        key: seed of the order, as in `seeded_random`.
    """

    def __init__(self, n: int, *key: object) -> None:
        generator = seeded_random("permutation", n, *key)
        self.keys = [generator.getrandbits(64) for _ in range(ROUNDS)]
        self.half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        super().__init__(n, self._permute_until_below)

    def _permute_until_below(self, index: int) -> int:
        index = self._permute(index)
        while index >= self.size:
            index = self._permute(index)
        return index

    def _permute(self, index: int) -> int:
        low_bits = (1 << self.half) - 1
        left, right = index >> self.half, index & low_bits
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & low_bits)
        return left << self.half | right


def _mix(value: int) -> int:
    """Return 64 well mixed bits of an integer (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


class LazyExamples(Sequence[dict[str, Any]]):
    """Examples that are tokenized when they are read.

    Args:
        rows: the rows.
        encode: function rows -> their examples.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        encode: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    ) -> None:
        self.rows = rows
        self.encode = encode

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(list(range(*index.indices(len(self)))))
        return self.encode([self.rows[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the examples of a batch. A DataLoader calls this."""
        return self.encode([self.rows[index] for index in indices])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
