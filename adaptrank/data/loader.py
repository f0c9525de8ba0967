"""A loader of collated batches that resumes in the middle of an epoch.

How a resume works. Lightning stores the `state_dict()` of every train loader that has one in
`fit_loop.state_dict`, and hands it to `load_state_dict()` before it calls `iter()`. It skips no
batch itself. It goes on counting (`fit_loop.batch_idx`) from where it was, and the loader has to
begin there. The loader skips indices, so a skipped batch is never collated.

The traps:

- Reading `trainer.estimated_stepping_batches` early (in an optimizer's schedule, in an allocator)
  makes Lightning build the loader before it restores its loops. Then it delivers no state.
  `TaskData` therefore keeps the state as well, which is restored before all that. The loader asks
  for it (`restored`) at the first `next()`. If both states arrive, that of `TaskData` counts.
- Lightning calls `iter()` before epoch and batch counter are settled. Nothing may be decided before
  the first `next()`.
- At an epoch border Lightning may load the state of the epoch that is over. Its own batch counter,
  which is 0 then, tells the difference.
- With `max_steps`, Lightning's number of the epoch drifts. A run that ends within an epoch counts
  that epoch as done, and a resume at a border may count an empty one. After a resume the stored
  epoch therefore counts, and `epoch_offset` keeps the difference. The number that Lightning
  announces by `set_epoch` is of no use.
- A resume at a border with `max_epochs` alone gets no state from Lightning. There the Trainer's
  number is right.
- A state that is stored while the first batch of an epoch is used has one batch handed out.
  Lightning will count this batch as not done.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from adaptrank.data.batch_order import BatchOrder, RestOfOrder
from adaptrank.data.seeding import seeded_random

if TYPE_CHECKING:
    from lightning import Trainer

State = dict[str, Any]


class ResumableLoader:
    """Collated batches in a `BatchOrder`, resumable in the middle of an epoch.

    The class is deliberately no `torch.utils.data.DataLoader`. It builds one for every epoch.
    Under several processes Lightning replaces the sampler of a DataLoader, whereas `BatchOrder`
    already deals the shares. The loader never draws from PyTorch's global generator. Outside a
    Trainer, call `set_epoch` before every epoch.

    Args:
        examples: any object with `len` and integer indices. Where it has a method `at_epoch`, that
            returns the examples of an epoch.
        collate: function list of examples -> batch. With num_workers > 0 it must pickle.
        order: which examples make which batch.
        num_workers: processes that collate ahead. 0 collates in this one.
        trainer: the Trainer that trains on these batches. It is asked for the epoch, and for the
            batch where a resume begins.
        restored: function that returns the state to go on from once, and None from then on. It is
            asked once per epoch, by the Trainer's own loader only.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        order: BatchOrder,
        *,
        num_workers: int = 0,
        trainer: "Trainer | None" = None,
        restored: Callable[[], State | None] = lambda: None,
    ) -> None:
        self.examples = examples
        self.collate = collate
        self.num_workers = num_workers
        self.trainer = trainer
        self.restored = restored
        self.batch_sampler = order
        self.epoch = order.epoch
        self.position = 0
        self.epoch_offset = 0
        self._loaded: State | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        state, self._loaded = self._loaded, None
        if self.trainer is None:
            state, epoch, start = self._begin_alone(state)
        else:
            state, epoch, start = self._begin_under(self.trainer, state)
        if state is not None and start:
            self._warn_of_another_order(state["order"])
        self.batch_sampler.set_epoch(epoch)
        self.epoch, self.position = epoch, start
        for batch in self._collated(start):
            # A checkpoint that is written in the step of this batch counts it as seen.
            self.position += 1
            yield batch

    def _begin_alone(self, state: State | None) -> tuple[State | None, int, int]:
        """Return the state to go on from, the epoch and the first batch, without a Trainer."""
        epoch = self.batch_sampler.epoch
        is_resumed = state is not None and state["epoch"] == epoch
        start = state["position"] if state is not None and is_resumed else 0
        return state, epoch, start

    def _begin_under(
        self, trainer: "Trainer", state: State | None
    ) -> tuple[State | None, int, int]:
        """Return the state to go on from, the epoch and the first batch, under a Trainer."""
        start = 0
        if trainer.train_dataloader is self:
            state = self.restored() or state
        # Without a state the counter says nothing about this loader: other loaders of the same
        # Trainer may be read at any time.
        if state is not None:
            start = trainer.fit_loop.batch_idx + 1
            is_over = not start and state["position"] >= min(2, trainer.num_training_batches)
            self.epoch_offset = trainer.current_epoch - state["epoch"] - is_over
        return state, trainer.current_epoch - self.epoch_offset, start

    def _collated(self, start: int) -> "DataLoader[Any]":
        """Return the collated batches of this epoch from number `start` on."""
        order = self.batch_sampler
        # A DataLoader draws the seed of its workers. From the global generator, the number of
        # epochs would change the dropout of the training.
        seed = seeded_random("workers", order.seed, order.epoch, start).getrandbits(62)
        return DataLoader(
            self._examples_of_epoch(),  # type: ignore[arg-type]  # only `len` and indices are needed
            batch_sampler=RestOfOrder(order, start),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),
        )

    def _examples_of_epoch(self) -> Sequence[Any]:
        """Return the examples, as they are in this epoch where they differ."""
        at_epoch = getattr(self.examples, "at_epoch", None)
        return self.examples if at_epoch is None else at_epoch(self.batch_sampler.epoch)

    def _warn_of_another_order(self, stored: State) -> None:
        """Warn if a resumed epoch had other data settings."""
        changes = [
            f"{name} {stored.get(name)} -> {value}"
            for name, value in self.batch_sampler.fingerprint().items()
            if stored.get(name) != value
        ]
        if changes:
            warnings.warn(
                "The checkpoint was written in the middle of an epoch with other data settings "
                f"({', '.join(changes)}). The rest of this epoch repeats some examples and misses "
                "others. For an exact resume keep the settings as they were.",
                stacklevel=2,
            )

    def state_dict(self) -> State:
        """Return the epoch, the number of batches handed out in it, and what the order depends on.

        A state that was loaded and not yet used is returned as it is.
        """
        if self._loaded is not None:
            return self._loaded
        return {
            "epoch": self.epoch,
            "position": self.position,
            "order": self.batch_sampler.fingerprint(),
        }

    def load_state_dict(self, state: State) -> None:
        """Let the next iteration go on where `state` was, if it is one of the same epoch."""
        self._loaded = dict(state)
        self.batch_sampler.set_epoch(state["epoch"])
