"""Put a callback of this library in front of those of a trainer."""

from lightning.pytorch import Callback, Trainer


def ensure_in_front(trainer: Trainer, kind: type[Callback]) -> None:
    """Put a new callback of a class in front of all callbacks, unless there is one.

    The list is replaced, not changed: Lightning may be iterating over it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, kind) for callback in callbacks):
        trainer.callbacks = [kind(), *callbacks]  # type: ignore[attr-defined]
