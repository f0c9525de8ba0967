"""Greedy choice of the units to keep, from a second-order model of the loss. Pure."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptrank.allocation.budget import Filling, Floor, fill_budget, floor_of, value_per_cost
from adaptrank.allocation.plans import Plan, Resize
from adaptrank.allocation.scores.curvature import SecondOrder, alone
from adaptrank.axes import CostModel


def greedy(
    second: SecondOrder, cost: CostModel, budget: int, floor: Floor = 1, stop: bool = False
) -> tuple[list[int], bool]:
    """Return the indices to keep, and whether every unit alone would hurt by going.

    In that case the choice is within 1 - 1/e of the best one.

    The Hessian is projected first: M_ij -> max(M_ij, 0) off the diagonal, the nearest matrix with
    which the gain is submodular. Then units are kept one at a time, always the one that would hurt
    most by going: gain_i = -g_i + M_ii / 2 + sum of M_ij over all other units that are not kept.
    Each axis gets its floor first. If units cost unequally, the same is done by gain per cost as
    well, and the choice that is predicted to hurt less is returned.

    Args:
        second: gradient and Hessian.
        cost: cost model in the unit of the budget.
        budget: total cost of the kept units.
        floor: least number of units an axis keeps.
        stop: keep no unit whose gain is not positive, but at least one of all.
    """
    every_unit_hurts = bool((alone(second) >= -1e-12).all())
    choices = [_Greedy(second, cost, budget, by_cost=False).choose(floor, stop)]
    none_kept = _no_units(second)
    if any(cost.marginal(axis, none_kept | {axis: 1}) != 1 for axis in none_kept):
        choices.append(_Greedy(second, cost, budget, by_cost=True).choose(floor, stop))

    everything = set(range(len(second.units)))

    def predicted_change(kept: list[int]) -> float:
        return second.change(sorted(everything - set(kept)))

    return min(choices, key=predicted_change), every_unit_hurts


class _Greedy:
    """One run of the greedy choice.

    Args:
        second: gradient and Hessian.
        cost: cost model in the unit of the budget.
        budget: total cost of the kept units.
        by_cost: order by gain per cost, not by gain.
    """

    def __init__(self, second: SecondOrder, cost: CostModel, budget: int, by_cost: bool) -> None:
        self.axis_of = [axis for axis, _ in second.units]
        self.filling = Filling(_no_units(second), cost, budget)
        self.by_cost = by_cost
        self.kept: dict[int, None] = {}
        """Indices in the order in which they were chosen."""
        self.column_of: dict[int, tuple[int, Tensor]] = {}
        """Index -> (first index of its block, its column of the projected Hessian)."""
        row_sums = []
        for start, M in second.blocks:
            projected = M.clamp_min(0)
            projected.diagonal().copy_(M.diagonal())
            row_sums.append(projected.sum(1))
            for i in range(len(M)):
                self.column_of[start + i] = (start, projected[:, i])
        # -g_i + M_ii / 2 + sum over j != i of M_ij. The M_ij of kept units are subtracted later.
        gains = -second.g - second.diagonal() / 2 + torch.cat(row_sums)
        self.gains: list[float] = gains.tolist()

    def choose(self, floor: Floor, stop: bool) -> list[int]:
        """Return the kept indices: the floors of all axes first, then what the budget pays for."""
        sizes = self.filling.sizes
        available = Counter(self.axis_of)
        floors = {axis: min(floor_of(floor, axis), available[axis]) for axis in sizes}

        def below_floor(index: int) -> bool:
            return sizes[self.axis_of[index]] < floors[self.axis_of[index]]

        def within_budget(index: int) -> bool:
            if stop and self.kept and self.gains[index] <= 0:
                return False
            return self.filling.affords(self.axis_of[index])

        self._fill(below_floor)
        self._fill(within_budget)
        return list(self.kept)

    def _fill(self, may_keep: Callable[[int], bool]) -> None:
        candidates = [index for index in range(len(self.axis_of)) if index not in self.kept]

        def fits(index: int) -> bool:
            return index not in self.kept and may_keep(index)

        fill_budget(candidates, self._value, fits, self._keep)

    def _value(self, index: int) -> float:
        axis = self.axis_of[index]
        price = self.filling.cost.marginal(axis, self.filling.sizes) if self.by_cost else 1
        return value_per_cost(self.gains[index], price)

    def _keep(self, index: int) -> None:
        self.kept[index] = None
        self.filling.add(self.axis_of[index])
        start, column = self.column_of[index]
        for other, interaction in enumerate(column.tolist(), start):
            if other != index:
                self.gains[other] -= interaction


def _no_units(second: SecondOrder) -> dict[str, int]:
    """Return {axis: 0} for all axes, also those without units: a cost may depend on them."""
    return dict.fromkeys([*(axis for axis, _ in second.units), *second.empty], 0)


def as_plan(second: SecondOrder, kept: Sequence[int]) -> Plan:
    """Return a plan that keeps these indices."""
    kept_units: dict[str, list[int]] = {axis: [] for axis, _ in second.units}
    sizes = dict.fromkeys(kept_units, 0)
    is_kept = set(kept)
    for index, (axis, unit) in enumerate(second.units):
        sizes[axis] += 1
        if index in is_kept:
            kept_units[axis].append(unit)
    plan: Plan = {}
    for axis, units in kept_units.items():
        if len(units) < sizes[axis]:
            plan[axis] = Resize(tuple(sorted(units)))
    return plan
