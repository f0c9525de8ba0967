"""Batches whose order is a pure function of (seed, epoch, index), and which resume in mid-epoch.

How a resume works. Lightning stores `state_dict()` of every train loader that has one in `fit_loop.state_dict`, and hands it
to `load_state_dict()` before it calls `iter()`. It skips no batch itself: it goes on counting (`fit_loop.batch_idx`) from where
it was, and the loader has to begin there. That is done on indices, so a skipped batch is never collated. The traps:
- Whoever reads `trainer.estimated_stepping_batches` early (an optimizer's schedule, an allocator) has Lightning build the loader
  before it restores its loops, and then it delivers no state. So `TaskData` keeps the state, too, which is restored before all
  that, and the loader asks for it (`restored`) at the first `next()`. Where both arrive, that one counts.
- Lightning calls `iter()` before epoch and batch counter are settled, so nothing may be decided before the first `next()`.
- At an epoch border it may load the state of the epoch that is over; its own batch counter, then 0, tells the difference.
- With `max_steps`, its number of the epoch drifts from what it would have been: a run that ends in mid-epoch counts that epoch as
  done, and a resume at a border may count an empty one. So after a resume the stored epoch is what counts, and `behind`
  keeps the difference; what Lightning announces by `set_epoch` is no use.
- A resume at a border with `max_epochs` alone gets no state from Lightning; there the Trainer's number is right.
- What is stored while the first batch of an epoch is used has one batch handed out, which Lightning will count as not done.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from adaptrank._errors import UserError

if TYPE_CHECKING:
    from lightning import Trainer

POOL = 50  # rounds of batches that are sorted by length together: enough to be even, few enough to stay random


def rng(*key: object) -> random.Random:
    """Return a generator that depends on nothing but `key`: the same on every machine, apart from every global one."""
    return random.Random(repr(key))


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

    There are ceil(n / (batch_size * world_size)) rounds and no example is dropped. Every process gets one batch a round, the
    shares are disjoint, and the last rounds are dealt evenly. Only where examples are too few to go round (n < world_size, or a
    remainder with batch_size 1) are the first ones of the order given twice, because a process without a batch would
    hang the others.

    Args:
        n: number of examples.
        batch_size: examples a batch and process.
        lengths: where given, (n,) any measure of length: batches hold examples of similar length, in shuffled order.
    """
    if not n:
        return []
    order = list(range(n))
    generator = rng("order", seed, epoch)
    if shuffle:
        generator.shuffle(order)
    size = batch_size * world_size
    count = -(-n // size)
    if shuffle and lengths is not None:
        pool = size * max(1, min(POOL, count // 4))
        order = [
            i
            for s in range(0, n, pool)
            for i in sorted(order[s : s + pool], key=lambda i: lengths[i])
        ]
    dealt = [order[s : s + size] for s in range(0, n, size)]
    if len(dealt) > 1 and len(dealt[-1]) < world_size:
        tail = dealt.pop(-2) + dealt.pop()
        half = (len(tail) + 1) // 2
        dealt += [tail[:half], tail[half:]]
    if shuffle and lengths is not None:
        generator.shuffle(dealt)
    spare = order * world_size
    full = [r + spare[: max(0, world_size - len(r))] for r in dealt]
    return [
        [r[k * len(r) // world_size : (k + 1) * len(r) // world_size] for k in range(world_size)]
        for r in full
    ]


class BatchOrder:
    """One process's share of `rounds`, as a batch sampler.

    Args:
        n: number of examples.
        batch_size: examples a batch and process.
        seed: with the epoch, all that the order depends on.
        shuffle: False keeps the order of the examples, in every epoch.
        lengths: see `rounds`.
        rank: this process, from 0.
        world_size: number of processes that share the examples.

    Raises:
        ValueError: if batch_size, rank or world_size is out of range, or lengths has another size than n.
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
            raise UserError(f"batch_size={batch_size} holds no example; use 1 or more.")
        if not 0 <= rank < world_size:
            raise UserError(
                f"rank={rank} is not among {world_size} processes; use 0 to {world_size - 1}."
            )
        if lengths is not None and len(lengths) != n:
            raise UserError(
                f"{len(lengths)} lengths arrived for {n} examples; give one length an example."
            )
        self.n, self.batch_size, self.seed, self.shuffle, self.lengths = (
            n,
            batch_size,
            seed,
            shuffle,
            lengths,
        )
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def fingerprint(self) -> dict[str, int | bool]:
        """Everything besides the epoch that the order depends on."""
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


class ResumableLoader:
    """Collated batches in a `BatchOrder`, resumable in the middle of an epoch.

    It is deliberately no `torch.utils.data.DataLoader` (it builds one for every epoch), because Lightning replaces the sampler
    of those under several processes, whereas `BatchOrder` already deals the shares. It never draws from torch's global
    generator. Outside a Trainer, call `set_epoch` before every epoch.

    Args:
        examples: anything with `len` and integer indices.
        collate: list of examples -> batch; with num_workers > 0 it must pickle.
        order: which examples make which batch.
        num_workers: processes that collate ahead; 0 collates in this one.
        trainer: the Trainer that trains on these batches, which is asked for the epoch and for where in it a resume begins.
        restored: gives the state to go on from, and None from then on; asked once an epoch, by the Trainer's own loader only.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        order: BatchOrder,
        *,
        num_workers: int = 0,
        trainer: "Trainer | None" = None,
        restored: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        self.examples, self.collate, self.num_workers = examples, collate, num_workers
        self.trainer, self.restored = trainer, restored
        self.batch_sampler = order
        self.epoch, self.position, self.behind = order.epoch, 0, 0
        self._resume: dict[str, Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        order = self.batch_sampler
        state, self._resume = self._resume, None
        if self.trainer is None:
            epoch = order.epoch
            start = state["position"] if state is not None and state["epoch"] == epoch else 0
        else:
            counted, start = self.trainer.current_epoch, 0
            if self.trainer.train_dataloader is self:
                state = self.restored() or state
            if (
                state is not None
            ):  # only then: others may read another loader of the same Trainer at any time
                start = self.trainer.fit_loop.batch_idx + 1
                over = not start and state["position"] >= min(2, self.trainer.num_training_batches)
                self.behind = counted - state["epoch"] - over
            epoch = counted - self.behind
        if state is not None and start:
            self._check(state["order"])
        order.set_epoch(epoch)
        self.epoch, self.position = epoch, start
        batches = list(order)[start:]
        loader: DataLoader[Any] = DataLoader(
            self.examples,  # type: ignore[arg-type]  # a Dataset is whatever has these two methods
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # DataLoader draws the seed of its workers: from here, or the dropout of the training would depend on it.
            generator=torch.Generator().manual_seed(
                rng("workers", order.seed, order.epoch, start).getrandbits(62)
            ),
        )
        for batch in loader:
            self.position += (
                1  # before the batch is used: a checkpoint written in its step counts it as seen
            )
            yield batch

    def _check(self, stored: dict[str, Any]) -> None:
        now = self.batch_sampler.fingerprint()
        differing = [f"{k} {stored.get(k)} -> {v}" for k, v in now.items() if stored.get(k) != v]
        if differing:
            warnings.warn(
                f"The checkpoint was written in the middle of an epoch with other data settings ({', '.join(differing)}), so "
                f"the rest of this epoch repeats some examples and misses others; for an exact resume keep them as they were.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of batches handed out in it, and what the order depends on."""
        if self._resume is not None:  # asked before the first batch after a resume
            return self._resume
        return {
            "epoch": self.epoch,
            "position": self.position,
            "order": self.batch_sampler.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where that state was, if it is one of the same epoch."""
        self._resume = dict(state)
        self.batch_sampler.set_epoch(state["epoch"])
