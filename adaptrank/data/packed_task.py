"""A task whose training examples may share rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from adaptrank.data.collate import Batch
from adaptrank.data.packing import PackedExamples, check_packing, pack_examples, packed_batch
from adaptrank.data.task import Row, Split, TaskData


class PackedTask(TaskData):
    """Rows of tokens in which several examples may stand.

    Args:
        packing: put several training examples into each row of at most `max_length` tokens.
            `batch_size` then counts rows. No token attends to another example.
        kwargs: those of `TaskData`.

    Raises:
        UserError: if `packing` stands beside `group_by_length`. In `train_dataloader`, if examples
            are tokenized when they are read.
    """

    def __init__(self, *, packing: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_packing(packing, self.group_by_length)
        self.packing = packing
        self._packed: PackedExamples | None = None

    def batched(self, split: Split) -> tuple[Sequence[Row], Callable[[Sequence[Row]], Batch]]:
        if split != "train" or not self.packing:
            return super().batched(split)
        if self._packed is None:
            self._packed = pack_examples(self.examples("train"), self.max_length, self.seed)
        return self._packed, partial(packed_batch, pad_id=self.pad_id)

    def describe_training(self) -> dict[str, Any]:
        # Checkpoints of unpacked runs do not have the key.
        return super().describe_training() | ({"packing": True} if self.packing else {})
