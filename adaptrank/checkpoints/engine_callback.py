"""EngineCallback: a callback of Lightning whose engine has a state in checkpoints."""

from collections.abc import Mapping
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer


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
    the run of a checkpoint was.

    Args:
        engine: runs the allocator or the training strategy.
    """

    engine: Resumable

    def __init__(self, engine: Resumable) -> None:
        self.engine = engine
        self._resumed_at = 0
        """Optimizer steps in the checkpoint that the run resumes from, of all optimizers."""

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
