"""Choose which examples make which batch, as a pure function of (seed, epoch, index)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.lazy import Permutation
from adaptrank.data.seeding import seeded_random

POOL = 50
"""Rounds of batches that are sorted by length together.

Many give batches of even length. Few keep the order random.
"""


def rounds(
    n: int,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    lengths: Sequence[int] | None = None,
    world_size: int = 1,
) -> list[list[list[int]]]:
    """Deal out n examples: [round][rank] -> indices of the examples in that batch.

    There are ceil(n / (batch_size * world_size)) rounds and no example is dropped. Every process
    gets one batch per round, the shares are disjoint, and the last rounds are dealt evenly. If
    there are too few examples for all processes (n < world_size, or a remainder with batch_size
    1), the first ones of the order are given twice, because a process without a batch would hang
    the others.

    Args:
        n: number of examples.
        batch_size: examples per batch and process.
        seed: seed of the order.
        epoch: number of the epoch, which also decides the order.
        shuffle: False keeps the order of the examples.
        lengths: (n,) lengths in any measure. If given, a shuffled order has batches of similar
            length.
        world_size: number of processes.
    """
    if not n:
        return []
    generator = seeded_random("order", seed, epoch)
    round_size = batch_size * world_size
    order = list(range(n))
    if shuffle:
        generator.shuffle(order)
    if shuffle and lengths is not None:
        order = _sort_within_pools(order, lengths, round_size)
    dealt = list(_deal_rounds(order, round_size, world_size))
    if shuffle and lengths is not None:
        generator.shuffle(dealt)
    return [_share_round(examples, order, world_size) for examples in dealt]


def lazy_rounds(
    n: int,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    world_size: int = 1,
    start: int = 0,
) -> Iterator[list[list[int]]]:
    """Yield rounds as `rounds` deals them, from round `start` on, in constant memory.

    The random order is another one than that of `rounds`.
    """
    order = Permutation(n, "order", seed, epoch) if shuffle else range(n)
    for examples in _deal_rounds(order, batch_size * world_size, world_size, start):
        yield _share_round(examples, order, world_size)


def _sort_within_pools(order: list[int], lengths: Sequence[int], round_size: int) -> list[int]:
    """Sort examples by length within pools of several rounds."""
    count = -(-len(order) // round_size)
    pool_size = round_size * max(1, min(POOL, count // 4))
    result: list[int] = []
    for start in range(0, len(order), pool_size):
        result += sorted(order[start : start + pool_size], key=lambda index: lengths[index])
    return result


def _deal_rounds(
    order: Sequence[int], round_size: int, world_size: int, start: int = 0
) -> Iterator[list[int]]:
    """Cut an order into rounds, and level the last two if the last has too few examples."""
    n = len(order)
    count = -(-n // round_size)
    before_last = (count - 1) * round_size
    is_levelled = count > 1 and n - before_last < world_size
    borders = [before_last - round_size, before_last, n]
    if is_levelled:
        borders[1] = borders[0] + (n - borders[0] + 1) // 2
    for k in range(start, count):
        if k < count - 2:
            yield list(order[k * round_size : (k + 1) * round_size])
        else:
            from_end = k - (count - 2)
            yield list(order[borders[from_end] : borders[from_end + 1]])


def _share_round(examples: list[int], order: Sequence[int], world_size: int) -> list[list[int]]:
    """Share the examples of one round among the processes, repeating examples if too few."""
    spare = [order[k % len(order)] for k in range(world_size - len(examples))]
    full = examples + spare
    borders = [rank * len(full) // world_size for rank in range(world_size + 1)]
    return [full[borders[rank] : borders[rank + 1]] for rank in range(world_size)]


class BatchOrder:
    """One process's share of `rounds`, as a batch sampler.

    Args:
        n: number of examples.
        batch_size: examples per batch and process.
        seed: seed of the order, which depends on it and on the epoch only.
        shuffle: False keeps the order of the examples, in every epoch.
        lengths: see `rounds`.
        rank: number of this process, from 0.
        world_size: number of processes that share the examples.
        lazy: compute the order batch by batch, in constant memory. It is another order.

    Raises:
        UserError: if batch_size, rank or world_size is out of range, or if there are not n lengths.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        lengths: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        lazy: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} holds no example. Use 1 or more.")
        if not 0 <= rank < world_size:
            raise UserError(
                f"rank={rank} is not among {world_size} processes. Use 0 to {world_size - 1}."
            )
        if lazy and lengths is not None:
            raise UserError(
                "An order that is computed batch by batch knows no lengths. Leave `lengths` out."
            )
        if lengths is not None and len(lengths) != n:
            raise UserError(
                f"{len(lengths)} lengths arrived for {n} examples. Give one length per example."
            )
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.lengths = lengths
        self.rank = rank
        self.world_size = world_size
        self.lazy = lazy
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def fingerprint(self) -> dict[str, int | bool]:
        """Return everything besides the epoch that the order depends on."""
        fingerprint: dict[str, int | bool] = {
            "examples": self.n,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "group_by_length": self.lengths is not None,
        }
        # Older checkpoints do not have the key.
        return fingerprint | ({"lazy": True} if self.lazy else {})

    def __len__(self) -> int:
        return -(-self.n // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[list[int]]:
        """Yield the batches of this process from number `start` on."""
        options: dict[str, Any] = {
            "seed": self.seed,
            "epoch": self.epoch,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
        }
        dealt: Iterable[list[list[int]]]
        if self.lazy:
            dealt = lazy_rounds(self.n, self.batch_size, start=start, **options)
        else:
            dealt = rounds(self.n, self.batch_size, lengths=self.lengths, **options)[start:]
        return (batches[self.rank] for batches in dealt)


class RestOfOrder:
    """The batches of an order from one of them on, as the batch sampler of a DataLoader."""

    def __init__(self, order: BatchOrder, start: int) -> None:
        self.order = order
        self.start = start

    def __len__(self) -> int:
        return max(0, len(self.order) - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.batches_from(self.start)
