"""The earlier form of an allocator in a `transformers.Trainer`: `AllocatorCallback(allocator)`."""

from typing import Any

from transformers import TrainerCallback

from adaptrank.allocation.participant import Participant


class AllocatorCallback(TrainerCallback):
    """Hands the events of a `transformers.Trainer` to an allocator.

    The Trainer takes an allocator as it is, `callbacks=[allocator]`. This form stays for programs
    that were written before.

    Args:
        allocator: an allocator or a rank initializer.
    """

    def __init__(self, allocator: Participant) -> None:
        self.allocator = allocator

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.on_init_end(*args, **kwargs)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.on_train_begin(*args, **kwargs)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.on_step_begin(*args, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.on_pre_optimizer_step(*args, **kwargs)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.on_optimizer_step(*args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.on_log(*args, **kwargs)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.on_save(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.on_train_end(*args, **kwargs)
