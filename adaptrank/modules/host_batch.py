"""The batch of a step as it was on the host, where its values can be read without waiting.

How many tokens have a label, how long the examples are, and whether there is padding decide what a
step computes. All of it is known on the host before the batch moves. To read it from the device
would make the host wait for the work of the device, at every step.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

HOOKS = ("transfer_batch_to_device", "on_after_batch_transfer")
"""Hooks that may give the device other values than the host has."""


class HostBatch:
    """Remember the tensors of the batch that moved last, and where they came from.

    A batch itself stays as it is: no key is added to it.
    """

    def __init__(self) -> None:
        self._moved: dict[int, tuple[Tensor, int, Tensor]] = {}
        """Id of a tensor on the device -> the tensor, its version, and the tensor on the host."""

    def forget(self) -> None:
        """Forget the batch, so that its tensors can be freed."""
        self._moved.clear()

    def note(self, host: Any, moved: Any) -> None:
        """Note a batch that moved. Forget the one before.

        Args:
            host: the batch before.
            moved: the batch on the device, with the same values.
        """
        self.forget()
        if not isinstance(host, Mapping) or not isinstance(moved, Mapping):
            return
        for key, value in moved.items():
            source = host.get(key)
            if not _is_plain(value) or not _is_plain(source):
                continue
            if source.device.type == "cpu":
                self._moved[id(value)] = (value, value._version, source)

    def of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with its tensors on the host, if all of them are known there.

        A batch of which a tensor did not come from the host, or was changed since, stays as it is.
        """
        sources = {key: self._source(value) for key, value in batch.items()}
        known = all(
            sources[key] is not value or value.device.type == "cpu"
            for key, value in batch.items()
            if isinstance(value, Tensor)
        )
        return sources if known else dict(batch)

    def _source(self, value: Any) -> Any:
        known = self._moved.get(id(value))
        if known is None or known[0] is not value or value._version != known[1]:
            return value
        return known[2]


def _is_plain(value: Any) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor that counts its changes."""
    return isinstance(value, Tensor) and not value.is_inference()


def watch_transfers(trainer: Trainer, host_batch: HostBatch) -> None:
    """Have a trainer's strategy note each training batch that it moves.

    A batch is not noted where the user's own hooks move it. The hooks of Lightning are no place for
    this, because a data module may have them as well.
    """
    unwatch_transfers(trainer)
    trainer.strategy.batch_to_device = _NotingMove(  # type: ignore[method-assign]
        trainer, host_batch
    )


def unwatch_transfers(trainer: Trainer) -> None:
    """Undo `watch_transfers`, if it was called."""
    own = vars(trainer.strategy)
    noting = own.get("batch_to_device")
    if not isinstance(noting, _NotingMove):
        return
    noting.host_batch.forget()
    del own["batch_to_device"]
    if noting.earlier is not None:
        own["batch_to_device"] = noting.earlier


class _NotingMove:
    """Moves a batch as the strategy does, and notes it.

    Args:
        trainer: whose training batches are noted.
        host_batch: notes them.
    """

    def __init__(self, trainer: Trainer, host_batch: HostBatch) -> None:
        self.trainer, self.host_batch = trainer, host_batch
        self.earlier = vars(trainer.strategy).get("batch_to_device")
        """The strategy's own method, which was replaced."""
        self._move: Callable[..., Any] = trainer.strategy.batch_to_device

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # The batch before is freed before this one takes its place.
        self.host_batch.forget()
        # A batch of a tokenizer moves in place.
        host = dict(batch) if isinstance(batch, Mapping) else batch
        moved = self._move(batch, *args, **kwargs)
        if self.trainer.training and not self._has_own_hook():
            self.host_batch.note(host, moved)
        return moved

    def _has_own_hook(self) -> bool:
        owners = (self.trainer.lightning_module, getattr(self.trainer, "datamodule", None))
        return any(
            owner is not None and is_overridden(hook, owner) for owner in owners for hook in HOOKS
        )
