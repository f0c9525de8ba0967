"""An event: a plan carried out on tensors, optimizer state and tracked tensors, and its record."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from adaptrank.allocation.plans import Close, Plan
from adaptrank.axes import RankAxis, generator

if TYPE_CHECKING:
    from adaptrank.allocation.state import TrackedTensors


class Event(TypedDict, total=False):
    """A change of ranks at an optimizer step; a line of `ranks.jsonl`."""

    step: int
    reason: str
    budget: int | None
    unit: str
    total: int  # cost of the open units, in the unit of the budget
    active: int  # open units
    allocated: int  # units in memory
    parameters: int  # trainable parameters of the adapters, without those of closed units
    allocated_parameters: int  # the same with those of closed units
    sizes: dict[str, int]  # axes that changed, after the event
    pruned: dict[str, list[int]]
    grown: dict[str, int]
    closed: dict[str, list[int]]
    scores: dict[str, float]  # minimum, quartiles and maximum over all units
    skipped: str
    dimensions: list[float]  # intrinsic dimensions of the inputs of the blocks, and of the output


Apply = Callable[[Plan, int], Event]
"""Function (plan, step) -> what was done. It carries the plan out."""


@dataclass(frozen=True)
class Proposal:
    """A plan, and a remark for the record of its event."""

    plan: Plan
    remark: str = ""


def execute(
    plan: Plan,
    axes: Mapping[str, RankAxis],
    state: "TrackedTensors",
    optimizers: Iterable[torch.optim.Optimizer],
    seed: int,
    step: int,
) -> Event:
    """Carry a plan out and return what was done.

    Args:
        plan: {axis key: Resize or Close}.
        axes: rank axes by key.
        state: tensors that follow the changes.
        optimizers: optimizers whose state follows the changes.
        seed: seed of the generator that initializes new units.
        step: optimizer step of the event.
    """
    done: Event = {"pruned": {}, "grown": {}, "closed": {}, "sizes": {}}
    optimizers = list(optimizers)
    for key, change in plan.items():
        axis = axes[key]
        if isinstance(change, Close):
            axis.close(change.units, optimizers)
            done["closed"][key] = list(change.units)
            continue
        size = len(axis)
        random, others = generator(seed, key, step), axes.values()
        axis.resize(change.keep, change.grow, random, optimizers, others)
        state.follow(axis, change)
        removed = sorted(set(range(size)) - set(change.keep))
        if removed:
            done["pruned"][key] = removed
        if change.grow:
            done["grown"][key] = change.grow
        done["sizes"][key] = len(axis)
    return done


def summarize_scores(values: Tensor) -> dict[str, float]:
    """Return minimum, quartiles and maximum of the scores of all units; empty without units."""
    too_many = 1 << 24  # largest input of torch.quantile
    if not 0 < len(values) < too_many:
        return {}
    levels = torch.linspace(0, 1, 5, dtype=values.dtype)
    names = ("min", "q25", "median", "q75", "max")
    return dict(zip(names, values.quantile(levels).tolist(), strict=True))


def describe(event: Event, budget: int | None, units_before: int, units_after: int) -> str:
    """Return the reason of an event as a sentence: the budget, and the units that moved."""
    counts = {
        "pruned": sum(map(len, event["pruned"].values())),
        "closed": sum(map(len, event["closed"].values())),
        "grown": sum(event["grown"].values()),
    }
    moved = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    limit = "no budget binds" if budget is None else f"budget {budget} {event['unit']}"
    return f"{limit}: {moved or 'nothing moved'}, {units_before} -> {units_after} open units"
