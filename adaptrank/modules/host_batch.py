"""The batch of a step as it was on the host, where its values can be read without waiting.

How many tokens have a label, how long the examples are, and whether there is padding decide what a
step computes. All of it is known on the host before the batch moves. To read it from the device
would make the host wait for the work of the device, at every step.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeGuard

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
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

    def note(self, host: Any, moved: Any) -> None:
        """Note a batch that moved. Forget the one before.

        Args:
            host: the batch before.
            moved: the batch on the device, with the same values.
        """
        self._moved.clear()
        if not isinstance(host, Mapping) or not isinstance(moved, Mapping):
            return
        for key, value in moved.items():
            source = host.get(key)
            if not _is_plain(value) or not _is_plain(source):
                continue
            if source.device.type == "cpu":
                self._moved[id(value)] = (value, value._version, source)

    def of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with its tensors on the host, where they are known there.

        A tensor that did not come from the host, or was changed since, stays as it is.
        """
        return {key: self._source(value) for key, value in batch.items()}

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
    strategy: Strategy = trainer.strategy
    strategy.batch_to_device = partial(  # type: ignore[method-assign]
        _move_and_note, trainer, host_batch
    )


def unwatch_transfers(trainer: Trainer) -> None:
    """Undo `watch_transfers`."""
    trainer.strategy.__dict__.pop("batch_to_device", None)


def _move_and_note(
    trainer: Trainer, host_batch: HostBatch, batch: Any, *args: Any, **kw: Any
) -> Any:
    strategy: Strategy = trainer.strategy
    moved = type(strategy).batch_to_device(strategy, batch, *args, **kw)
    owners = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    has_own_hook = any(
        owner is not None and is_overridden(hook, owner) for owner in owners for hook in HOOKS
    )
    if trainer.training and not has_own_hook:
        host_batch.note(batch, moved)
    return moved
