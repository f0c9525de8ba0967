"""EngineCallback: a callback of Lightning whose engine has a state in checkpoints."""

from collections.abc import Mapping
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer

from adaptrank.checkpoints.recorder import ensure_recorder
from adaptrank.training.adapter_gradients import ensure_gradients
from adaptrank.training.distributed import keep_apart, rejoin
from adaptrank.training.peers import ensure_peer_watch


class Resumable(Protocol):
    """An engine that goes on from its state in a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take a state; the next start goes on from there."""
        ...

    def finish(self) -> None:
        """Remove hooks at the end of a run."""
        ...


class EngineCallback(Callback):
    """Base of the Lightning shells of allocators and of training strategies.

    It keeps the state of an engine in checkpoints, under the name of the class, and notes how far
    the run of a checkpoint was. It starts the engine, and prepares the Trainer for adapters whose
    tensors change. A subclass implements `start_engine`.

    Args:
        engine: runs the allocator or the training strategy.
    """

    engine: Resumable

    def __init__(self, engine: Resumable) -> None:
        self.engine = engine
        self._resumed_at = 0
        """Optimizer steps in the checkpoint that the run resumes from, of all optimizers."""

    def prepare_fit(self, trainer: Trainer) -> None:
        """Forget an earlier run, and add what a Trainer needs for tensors that change.

        Call it from `setup`. A checkpoint that the run resumes from is loaded after that.
        """
        self._resumed_at = 0
        ensure_peer_watch(trainer)
        ensure_gradients(trainer)
        ensure_recorder(trainer)
        keep_apart(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the adapters back to Lightning's strategy."""
        if stage == "fit":
            rejoin(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run."""
        self.start_engine(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run again if a checkpoint was restored after on_fit_start."""
        self.start_engine(trainer, pl_module)

    def start_engine(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the engine, unless it runs."""
        raise NotImplementedError

    def finish(self) -> None:
        """Call this when training is over; it removes hooks."""
        self.engine.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the run."""
        self.finish()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note how far the run of the checkpoint was."""
        self._resumed_at = int(checkpoint.get("global_step", 0))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the engine."""
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint; the next start goes on from there."""
        self.engine.load_state_dict(state_dict)

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: the class, since a run has one of it."""
        return type(self).__qualname__
