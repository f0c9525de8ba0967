"""A few real steps of a run, to measure its time and its memory."""

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from adaptrank.artifacts.summary import peak_memory
from adaptrank.cli.quiet import quiet
from adaptrank.cli.train import AdaptrankCLI


class _Clock(Callback):
    """Times steps, and stops the run after some of them.

    Args:
        steps: number of optimizer steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.times: list[float] = []
        """When each step ended, and before them when training began."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the end of a step, and stop after the last one."""
        if trainer.global_step < len(self.times):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


class _Measured(AdaptrankCLI):
    """`fit` for a few steps, which evaluates nothing and leaves nothing."""

    def fit(self, **kwargs: Any) -> None:
        self.trainer.fit(**kwargs)


def measure_steps(args: Sequence[str], steps: int) -> dict[str, Any]:
    """Run a few steps of a configuration, and return seconds and bytes.

    Args:
        args: the command line of `fit`, without the verb.
        steps: number of optimizer steps. Time is measured without the first one.
    """
    clock = _Clock(steps + 1)

    class Clocked(_Measured):
        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks.append(clock)
            return trainer

    with tempfile.TemporaryDirectory() as folder, quiet():
        options = ["--runs", folder, "--trainer.enable_progress_bar", "false"]
        Clocked("fit", [*args, *options])
    spent = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    timed = spent[1:] or spent
    on_gpu = torch.cuda.is_available()
    return {
        "steps": len(timed),
        "seconds_per_step": sum(timed) / len(timed),
        "peak_bytes": peak_memory(),
        "of": "of the GPU" if on_gpu else "of the whole process, Python and libraries included",
    }
