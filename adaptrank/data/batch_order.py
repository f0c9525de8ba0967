"""Choose which examples make which batch, as a pure function of (seed, epoch, index)."""

from collections.abc import Iterator, Sequence

from adaptrank._errors import UserError
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
    dealt = _deal_rounds(order, round_size, world_size)
    if shuffle and lengths is not None:
        generator.shuffle(dealt)
    return [_share_round(examples, order, world_size) for examples in dealt]


def _sort_within_pools(order: list[int], lengths: Sequence[int], round_size: int) -> list[int]:
    """Sort examples by length within pools of several rounds."""
    count = -(-len(order) // round_size)
    pool_size = round_size * max(1, min(POOL, count // 4))
    result: list[int] = []
    for start in range(0, len(order), pool_size):
        result += sorted(order[start : start + pool_size], key=lambda index: lengths[index])
    return result


def _deal_rounds(order: list[int], round_size: int, world_size: int) -> list[list[int]]:
    """Cut an order into rounds, and level the last two if the last has too few examples."""
    dealt = [order[start : start + round_size] for start in range(0, len(order), round_size)]
    if len(dealt) > 1 and len(dealt[-1]) < world_size:
        tail = dealt.pop(-2) + dealt.pop()
        half = (len(tail) + 1) // 2
        dealt += [tail[:half], tail[half:]]
    return dealt


def _share_round(examples: list[int], order: list[int], world_size: int) -> list[list[int]]:
    """Share the examples of one round among the processes, repeating examples if too few."""
    spare = (order * world_size)[: max(0, world_size - len(examples))]
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
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} holds no example. Use 1 or more.")
        if not 0 <= rank < world_size:
            raise UserError(
                f"rank={rank} is not among {world_size} processes. Use 0 to {world_size - 1}."
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
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def fingerprint(self) -> dict[str, int | bool]:
        """Return everything besides the epoch that the order depends on."""
        return {
            "examples": self.n,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "group_by_length": self.lengths is not None,
        }

    def __len__(self) -> int:
        return -(-self.n // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batches in rounds(
            self.n,
            self.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
            lengths=self.lengths,
            world_size=self.world_size,
        ):
            yield batches[self.rank]
