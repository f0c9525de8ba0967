"""An allocator in a `transformers.Trainer`: the calls that a loop of one's own makes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adaptrank._collectives import several
from adaptrank._errors import UserError
from adaptrank._files import atomic_file
from adaptrank.allocation.participant import Participant
from adaptrank.allocation.shells.lightning import fit_before_load

STATE = "allocator.pt"
"""Name of the allocator's file, beside the weights in each checkpoint of the Trainer."""


class AllocatorCallback(TrainerCallback):
    """Runs an allocator in a `transformers.Trainer`, through its checkpoints as well.

    The Trainer clips gradients before it calls anyone, so scores see clipped gradients: all of a
    step are multiplied by one factor. Ranks move in one process only. Under several processes use
    Lightning.

    Args:
        allocator: an allocator or a rank initializer.
    Raises:
        ValueError: when training starts, for what the allocator refuses, or several processes.
    """

    def __init__(self, allocator: Participant) -> None:
        self.allocator = allocator
        self._scaler: Any = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the axes for a checkpoint, which is loaded before training starts."""
        model: nn.Module = kwargs["model"]
        model.register_load_state_dict_pre_hook(fit_before_load)  # type: ignore[no-untyped-call]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the run, or go on from the checkpoint."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._scaler = getattr(optimizer, "scaler", None)  # accelerate's wrapper, in float16
        name = self.allocator.label
        if several():
            raise UserError(
                f"{name} moves ranks under several processes with Lightning only; run the Trainer "
                f"in one."
            )
        if state.global_step:
            file = _state_file(args, state)
            if not file.is_file():
                raise UserError(
                    f"{file.parent} holds no {STATE}, so the allocator cannot go on; it was saved "
                    f"without this callback."
                )
            self.allocator.load_state_dict(torch.load(file, weights_only=True))

        def loss(batch: Any) -> Any:
            return model(**batch)["loss"]

        self.allocator.start(
            model,
            getattr(optimizer, "optimizer", optimizer),  # accelerate wraps it
            state.max_steps,
            batches=_Batches(kwargs["train_dataloader"], args.device),
            loss=loss,
        )

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the scores; the gradients are complete."""
        self.allocator.before_step(1.0 if self._scaler is None else self._scaler.get_scale())

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Finish the optimizer step."""
        self.allocator.step()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Note how many steps in a row had gradients that were not finite."""
        self.allocator.engine.read_bad_steps()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the state of the allocator beside the weights."""
        with atomic_file(_state_file(args, state)) as partial:
            torch.save(self.allocator.state_dict(), partial)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Finish the run."""
        self.allocator.finish()


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE


class _Batches:
    """Batches of the Trainer on its device, from the beginning.

    Reading them does not move the loader that training reads.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self._loader, self._device = getattr(loader, "base_dataloader", loader), device

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):  # a shuffling sampler draws its seed
            batches = iter(self._loader)
        while True:
            with torch.random.fork_rng(devices=[]):
                batch = next(batches, None)
            if batch is None:
                return
            yield {name: value.to(self._device) for name, value in batch.items()}
