"""Callbacks of the commands: data that are read, Ctrl-C, checkpoints, the configuration."""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from adaptrank._files import atomic_file
from adaptrank.artifacts.run import RunFiles

INTERRUPTED = "interrupted.ckpt"


class Begins(Callback):
    """Report that training began: an error after that is not a mistake in the configuration.

    Args:
        report: called at the first training batch, and at the others.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report

    def on_train_batch_start(self, *args: Any) -> None:
        """Report it."""
        self._report()


class DataReady(Callback):
    """Report that the data are read, before the backbone is loaded.

    Args:
        report: called once for each run of the Trainer.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Report it. Lightning calls the data module before, and the module afterwards."""
        self._report()


class Interrupt(Callback):
    """End the run after the current step on Ctrl-C, with a checkpoint that resumes from there.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._asked = False
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle Ctrl-C from now on. Lightning's teardown puts the old handler back."""
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        text = "\nStopping after this step. Ctrl-C again stops at once."
        print(text, file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save and stop after a whole step. No checkpoint holds gradients amid accumulation."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if self._asked and stepped:
            trainer.save_checkpoint(self._folder / "checkpoints" / INTERRUPTED)
            raise KeyboardInterrupt


class StepCheckpoint(ModelCheckpoint):
    """Keep the latest of every n-th step's checkpoints, and the last step's at the end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, wherever it falls."""
        super().on_train_end(trainer, pl_module)
        if trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class SaveConfig(SaveConfigCallback):
    """Write the complete configuration into the run folder, where it starts the same run again.

    A run that was resumed leaves `ckpt_path` and `accept_changes` out, so that its file starts from
    the beginning.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write config.yaml into the run folder, if the run has one."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        folder = next((c.folder for c in callbacks if isinstance(c, RunFiles)), None)
        if folder is None:
            return
        config = self.config.clone()
        config["ckpt_path"] = None
        config["accept_changes"] = False
        with atomic_file(folder / "config.yaml") as file:
            self.parser.save(config, file, skip_none=False, overwrite=True, multifile=False)
