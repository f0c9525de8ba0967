"""The rounds of a run that is about to begin."""

from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from adaptrank.allocation import Participant
from adaptrank.strategies import strategy_of


def round_facts(trainer: Trainer, model: nn.Module, steps: int | None) -> dict[str, Any]:
    """Return the rounds of a training strategy, and the numbers that train in each.

    Args:
        trainer: its callbacks are the strategy and the allocators.
        model: the adapted model, which may be on the meta device.
        steps: optimizer steps of the run, or None if it has no end.

    Raises:
        UserError: if `fit` would refuse them.
    """
    strategy = strategy_of(trainer)
    if strategy is None:
        return {"training_strategy": None, "rounds": []}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    allocators = [callback for callback in callbacks if isinstance(callback, Participant)]
    total = float("inf") if steps is None else steps
    for allocator in allocators:
        allocator.foresee(model, total)
    engine = strategy.engine
    rounds = engine.foresee(model, trainer.optimizers, total, allocators)
    return {"training_strategy": strategy.label, "rounds": rounds}
