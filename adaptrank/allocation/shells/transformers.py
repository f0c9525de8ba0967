"""An allocator in a `transformers.Trainer`: the same three calls that a loop of one's own makes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adaptrank._collectives import several
from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator, fit_before_load

STATE = "allocator.pt"
"""Beside the weights in each checkpoint of the Trainer."""


class AllocatorCallback(TrainerCallback):
    """Runs an allocator in a `transformers.Trainer`, through its checkpoints as well.

    The Trainer clips gradients before it calls anyone, so scores see clipped ones: all of a step by one factor. Ranks move in one
    process only; under several use Lightning.

    Args:
        allocator: any.
    Raises:
        ValueError: when training starts, for what the allocator refuses, or several processes.
    """

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        self._scaler: Any = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        # A checkpoint is loaded before training starts, and its ranks may differ.
        model.register_load_state_dict_pre_hook(fit_before_load)  # type: ignore[no-untyped-call]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._scaler = getattr(optimizer, "scaler", None)  # of accelerate's wrapper, in float16
        if several():
            raise UserError(
                f"{type(self.allocator).__name__} moves ranks under several processes with Lightning only; run the Trainer in one."
            )
        if state.global_step:
            file = _state_file(args, state)
            if not file.is_file():
                raise UserError(
                    f"{file.parent} holds no {STATE}, so the allocator cannot go on; it was saved without this callback."
                )
            self.allocator.load_state_dict(torch.load(file, weights_only=True))
        self.allocator.start(
            model,
            getattr(optimizer, "optimizer", optimizer),  # accelerate wraps it
            state.max_steps,
            batches=_Batches(kwargs["train_dataloader"], args.device),
            loss=lambda batch: model(**batch)["loss"],
        )

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.before_step(1.0 if self._scaler is None else self._scaler.get_scale())

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        file = _state_file(args, state)
        partial = file.with_suffix(".new")
        torch.save(self.allocator.state_dict(), partial)
        os.replace(partial, file)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.allocator.finish()


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE


class _Batches:
    """The Trainer's batches on its device, from their beginning; reading them does not move the loader that training reads."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self._loader, self._device = getattr(loader, "base_dataloader", loader), device

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):  # what shuffles draws from it
            batches = iter(self._loader)
        while True:
            with torch.random.fork_rng(devices=[]):
                batch = next(batches, None)
            if batch is None:
                return
            yield {name: value.to(self._device) for name, value in batch.items()}
