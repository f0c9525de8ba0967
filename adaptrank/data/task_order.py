"""The order of training in class-incremental learning: batches of one task after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adaptrank.data.batch_order import BatchOrder, rounds


@dataclass(frozen=True)
class TaskShare:
    """The share of one task in an epoch of the trainer.

    Args:
        indices: indices of its examples.
        batches: number of batches for each process.
    """

    indices: Sequence[int]
    batches: int


class TaskOrder(BatchOrder):
    """One process's share of the batches of one task after the other.

    Each task is passed over again and again until it had its batches. Every pass has an order of
    its own, which depends on the seed and on the number of the pass over all tasks.

    Args:
        tasks: share of each task.
        batch_size: examples per batch and process.
        numbers_passes: add n times the number of its pass to the index of an example, for
            `ExamplesByPass`.
        kwargs: those of `BatchOrder`.
    """

    def __init__(
        self, tasks: Sequence[TaskShare], batch_size: int, numbers_passes: bool, **kwargs: Any
    ) -> None:
        super().__init__(sum(len(task.indices) for task in tasks), batch_size, **kwargs)
        self.tasks = list(tasks)
        self.numbers_passes = numbers_passes

    def fingerprint(self) -> dict[str, Any]:
        sizes = [[len(task.indices), task.batches] for task in self.tasks]
        return {**super().fingerprint(), "tasks": sizes}

    def __len__(self) -> int:
        return sum(task.batches for task in self.tasks)

    def batches_from(self, start: int) -> Iterator[list[int]]:
        first_pass = self.epoch * sum(self._passes(task) for task in self.tasks)
        for task in self.tasks:
            if start < task.batches:
                yield from self._batches_of(task, first_pass, start)
            start = max(0, start - task.batches)
            first_pass += self._passes(task)

    def _batches_of(self, task: TaskShare, first_pass: int, start: int) -> Iterator[list[int]]:
        """Yield the batches of a task from number `start` on.

        Args:
            task: the task.
            first_pass: number of its first pass.
            start: number of a batch within the task.
        """
        per_pass = self._batches_per_pass(task)
        number, offset = divmod(start, per_pass)
        left = task.batches - start
        lengths = None
        if self.lengths is not None:
            lengths = [self.lengths[index] for index in task.indices]
        while left > 0:
            dealt = rounds(
                len(task.indices),
                self.batch_size,
                seed=self.seed,
                epoch=first_pass + number,
                shuffle=self.shuffle,
                lengths=lengths,
                world_size=self.world_size,
            )[offset : offset + left]
            shift = (first_pass + number) * self.n if self.numbers_passes else 0
            for batches in dealt:
                yield [task.indices[place] + shift for place in batches[self.rank]]
            left -= len(dealt)
            number, offset = number + 1, 0

    def _batches_per_pass(self, task: TaskShare) -> int:
        return -(-len(task.indices) // (self.batch_size * self.world_size))

    def _passes(self, task: TaskShare) -> int:
        return -(-task.batches // self._batches_per_pass(task))


class ExamplesByPass(Sequence[Any]):
    """Examples that differ from pass to pass, such as images that are mirrored at random.

    The index of an example is its own, plus the number of all examples times the number of the
    pass.

    Args:
        examples: examples with `at_epoch`.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(list(range(*index.indices(len(self)))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return the examples of a batch, which are all of one pass. A DataLoader calls this."""
        if not indices:
            return []
        count = len(self.examples)
        of_pass = self.examples.at_epoch(indices[0] // count)
        return [of_pass[index % count] for index in indices]
