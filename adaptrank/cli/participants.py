"""Callbacks of a run that the typed keys ask for: allocators, a training strategy, `save`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from adaptrank.allocation import Participant
from adaptrank.cli.callbacks import StepCheckpoint
from adaptrank.cli.errors import ConfigError
from adaptrank.strategies import TrainingStrategy


def participants(
    allocator: Any, initial: Any, strategy: Any, configured: Sequence[Callback]
) -> list[Callback]:
    """Return the allocators and the strategy of the typed keys, in the order in which they act.

    They come before any ModelCheckpoint, so that a checkpoint at an event holds the new ranks.

    Args:
        allocator: the object of the key `allocator`, or None.
        initial: the object of the key `initial_ranks`, or None.
        strategy: the object of the key `training_strategy`, or None.
        configured: the callbacks of `trainer.callbacks`.
    Raises:
        ConfigError: if two would move the same ranks, or divide the run into rounds.
        UserError: if the strategy refuses an allocator.
    """
    if initial is not None and initial.moves:
        raise ConfigError(
            f"initial_ranks: {type(initial).__name__} moves ranks while training. "
            f"Give it as `allocator`."
        )
    for callback in configured:
        both_move = isinstance(callback, Participant) and callback.moves and allocator is not None
        if both_move and allocator.moves:
            raise ConfigError(
                f"`allocator` is {type(allocator).__name__}, and trainer.callbacks lists "
                f"{type(callback).__name__}: two would move the same ranks. Keep one."
            )
    _check_strategies(strategy, configured)
    typed = [given for given in (initial, allocator, strategy) if given is not None]
    every = [*typed, *configured]
    for callback in every:
        if isinstance(callback, TrainingStrategy):
            beside = [each for each in every if isinstance(each, Participant)]
            callback.engine.check_allocators(beside)
    return typed


def _check_strategies(strategy: Any, configured: Sequence[Callback]) -> None:
    """Refuse a second training strategy.

    Raises:
        ConfigError: names both.
    """
    listed = [
        f"trainer.callbacks lists {type(callback).__name__}"
        for callback in configured
        if isinstance(callback, TrainingStrategy)
    ]
    if strategy is not None:
        listed.insert(0, f"`training_strategy` is {type(strategy).__name__}")
    if len(listed) > 1:
        raise ConfigError(
            f"{listed[0]}, and {listed[1]}: two would divide the run into rounds. Keep one."
        )


def which_weights(
    save: Literal["best", "last"] | None, configured: Sequence[Callback]
) -> Literal["best", "last"] | None:
    """Return the key `save`. "best" needs a metric to go by.

    Raises:
        ConfigError: if there is none.
    """
    ranks = any(
        isinstance(callback, ModelCheckpoint) and callback.monitor is not None
        for callback in configured
    )
    if save == "best" and not ranks:
        raise ConfigError(
            "save: best needs a metric: add a ModelCheckpoint with a `monitor`, such as loss, "
            "to trainer.callbacks, or leave `save` out."
        )
    return save


def checkpoints(folder: Path, disabled: bool, configured: Sequence[Callback]) -> list[Callback]:
    """Return the checkpoint callback of a run that configures none.

    Args:
        folder: the run folder.
        disabled: whether the trainer writes no checkpoints.
        configured: the callbacks of `trainer.callbacks`.
    """
    if disabled or any(isinstance(callback, ModelCheckpoint) for callback in configured):
        return []
    return [StepCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=50)]
