"""UniformRanks: one rank for all layers, at a given budget or at that of a recorded run."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from adaptrank._errors import UserError
from adaptrank.allocation.budget import Filling, Floor, fill_in_turns, floors_within
from adaptrank.allocation.context import Axes
from adaptrank.allocation.controls.recorded_run import check_axes, read_ranks
from adaptrank.allocation.initial.initializer import Choice, RankInitializer
from adaptrank.allocation.plans import Caps
from adaptrank.axes import CostModel, generator


class UniformRanks(RankInitializer, control=True):
    """Start with ranks that are as equal as a budget allows, and keep them.

    This is a control for whatever chooses or moves ranks. The budget is stated, or it is the final
    total of a recorded run. With unit="parameters" a run whose parameters grew is compared with
    as many parameters. Ranks differ by one where the budget is no multiple of the number of axes:
    `seed` draws the axes that get one unit more. With less than one unit for each axis, a fixed
    choice such as the first layers would be a choice of places, and not a control.

    Args:
        budget: total to share out, in `unit`.
        run: folder of the recorded run whose final total is the budget, such as runs/NAME/0.
        unit: "ranks" counts units; "parameters" counts all trainable parameters of the adapters.
        seed: seed of that draw, and of the generator that initializes new units.
    Raises:
        UserError: if neither or both of `budget` and `run` are given, or the run is not there. At
            the start: if it had other axes.
    """

    requires = frozenset({"pattern"})

    def __init__(
        self,
        budget: int | None = None,
        run: str | None = None,
        unit: Literal["ranks", "parameters"] = "ranks",
        seed: int = 0,
    ) -> None:
        if (budget is None) == (run is None):
            raise UserError(
                f"UniformRanks: budget={budget}, run={run!r}: give one of the two, such as "
                f"budget=96 or run='runs/NAME/0'."
            )
        super().__init__(budget, unit, floor=0, seed=seed)
        self.folder = run
        self.ranks = None if run is None else read_ranks(run)

    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice:
        cost, budget = self.run.cost(), self.budget
        if self.ranks is not None:
            check_axes(self.label, str(self.folder), self.ranks, axes)
            budget = cost.total(self.ranks)
        assert budget is not None
        keys, random = list(axes), generator(self.seed, self.label, 0)
        in_turn = [keys[place] for place in torch.randperm(len(keys), generator=random).tolist()]
        sizes = uniform_sizes(in_turn, cost, budget, self.floors(), self.caps())
        return Choice({key: sizes[key] for key in keys})


def uniform_sizes(
    axes: Sequence[str], cost: CostModel, budget: int, floor: Floor, caps: Caps
) -> dict[str, int]:
    """Return sizes that differ by one at most, where no cap forbids it, within a budget.

    All axes grow to one size after the other. The last round ends where no axis that is due fits.

    Args:
        axes: axes in the order in which they get a unit of the last round.
        cost: cost model in the unit of the budget.
        budget: total, `cost.fixed` included, never exceeded.
        floor: least number of units of an axis.
        caps: axis -> largest number of units, None for no cap.
    Raises:
        UserError: if the floors alone cost more than the budget.
    """
    least = floors_within(dict.fromkeys(axes, 1), cost, budget, floor)
    filling = Filling(least, cost, budget)
    level = 1
    while _raise_to(level, filling, axes, caps):
        level += 1
    return filling.sizes


def _raise_to(level: int, filling: Filling, axes: Sequence[str], caps: Caps) -> bool:
    """Grow axes to a size, one unit each, and return whether all that may have it do."""
    due = [axis for axis in axes if _may_have(caps, axis, level)]
    fill_in_turns(filling, due, lambda axis: filling.sizes[axis] < level)
    return bool(due) and all(filling.sizes[axis] >= level for axis in due)


def _may_have(caps: Caps, axis: str, size: int) -> bool:
    cap = caps.get(axis)
    return cap is None or size <= cap
