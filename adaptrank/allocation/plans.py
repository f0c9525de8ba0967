"""Plans: from importance, cost and budget to the units that are kept, closed and grown.

Everything here is pure and deterministic. No tensor of a model is touched.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation.budget import (
    Filling,
    Floor,
    fill_budget,
    fill_in_turns,
    floor_of,
    floors_within,
    value_per_cost,
)
from adaptrank.axes import CostModel, natural

Scores = Mapping[str, Tensor]
"""axis -> importance of its units, (units,). Higher is kept."""

Caps = Mapping[str, int | None]
"""axis -> largest number of units, None for no cap."""


@dataclass(frozen=True)
class Resize:
    """Keep these units, in this order, and add `grow` fresh ones."""

    keep: tuple[int, ...]
    grow: int = 0


@dataclass(frozen=True)
class Close:
    """Set these units to zero and open all others. Tensors keep their size."""

    units: tuple[int, ...]


Plan = dict[str, Resize | Close]
"""axis -> its change. Axes that stay as they are are left out."""


def ranked(scores: Tensor) -> list[int]:
    """Return the units from the most to the least important. Ties fall to the lower index."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda unit: (-values[unit], unit))


# ---- pruning to a budget


def keep_best(scores: Scores, cost: CostModel, budget: int, floor: Floor = 1) -> Plan:
    """Keep the units with most importance per cost, never over the budget.

    Each axis keeps its `floor` best units. Then one unit is added at a time, the one with the
    highest score per marginal cost. Ties fall to the natural order of the axes. If every unit
    costs one, the budget is met exactly. Otherwise no further unit fits at the end.

    Args:
        scores: axis -> (units,), higher is kept.
        cost: cost model in the unit of the budget.
        budget: total after the plan, `cost.fixed` included.
        floor: least number of units an axis keeps; 0 lets an axis lose all of them.
    Returns:
        A `Resize` for every axis that loses units.
    Raises:
        UserError: if the floors alone cost more than the budget.
    """
    units = {axis: ranked(values) for axis, values in scores.items()}
    available = {axis: len(order) for axis, order in units.items()}
    filling = Filling(floors_within(available, cost, budget, floor), cost, budget)
    sizes = filling.sizes

    def value(axis: str) -> float:
        next_unit = units[axis][sizes[axis]]
        return value_per_cost(float(scores[axis][next_unit]), cost.marginal(axis, sizes))

    def fits(axis: str) -> bool:
        return sizes[axis] < available[axis] and filling.affords(axis)

    fill_budget(sorted(scores, key=natural), value, fits, filling.add)
    return {
        axis: Resize(tuple(sorted(order[: sizes[axis]])))
        for axis, order in units.items()
        if sizes[axis] < available[axis]
    }


def kept_units(plan: Plan) -> dict[str, int]:
    """Return axis -> number of old units that are kept, for each axis that is resized."""
    return {axis: len(change.keep) for axis, change in plan.items() if isinstance(change, Resize)}


# ---- exchanging units


@dataclass(frozen=True, order=True)
class _Offer:
    """A unit that its axis puts into a pool. Offers sort by `key`, then in natural order."""

    key: float
    place: int
    axis: str
    unit: int

    @property
    def name(self) -> tuple[str, int]:
        return self.axis, self.unit


def exchange(
    scores: Scores,
    cost: CostModel,
    budget: int,
    swaps: int,
    pool: int = 2,
    floor: Floor = 1,
    caps: Caps | None = None,
    reference: bool = False,
    held: Mapping[str, Collection[int]] | None = None,
) -> Plan:
    """Prune the weakest units, and grow the axes whose weakest units still matter.

    This is ElaLoRA's exchange (arXiv:2504.00254) with two pools. Every axis offers its `pool`
    lowest units. The `swaps` lowest scores among the units that an axis may lose (never below
    `floor`) are pruned. The `swaps` highest scores win one fresh unit each for their axis (never
    above its cap). A unit that is chosen for both is left alone.

    One unit is pruned at a time, and its cost pays for fresh units, so that the total never
    exceeds the budget. If every unit costs one, the total stays the same. Otherwise the rest is
    spent on the winning axes until no further unit of them fits.

    `reference=True` is the released rule with one pool for both. An axis at its floor is absent
    from that pool and can never grow again. A unit that is chosen for both is pruned, and its axis
    gets a fresh one for it. With two pools an axis without units has none to offer, and stays
    empty.

    Args:
        scores: axis -> (units,), higher is kept.
        cost: cost model in the unit of the budget.
        budget: total not to be exceeded.
        swaps: number of units to prune and to grow. It is reduced if the pools are small.
        pool: number of units an axis offers.
        floor: least number of units of an axis.
        caps: axis -> largest number of units, None for no cap.
        reference: use the single pool of the released code.
        held: axis -> units that are in no pool.
    """
    caps = caps or {}
    sizes = {axis: len(values) for axis, values in scores.items()}
    losing, winning = _pools(scores, pool, floor, caps, reference, held or {})
    to_prune, to_grow = _pick_swaps(losing, winning, swaps, renew=reference)
    winners = list(dict.fromkeys(axis for axis, _ in to_grow)) if to_prune else []

    filling = Filling(sizes, cost, budget)
    pruned: dict[str, set[int]] = {axis: set() for axis in scores}
    for axis, unit in to_prune:
        pruned[axis].add(unit)
        filling.remove(axis)
        to_grow = _grow_in_order(filling, to_grow)

    # Spend the remaining budget: grow the winning axes in turns until no further unit fits.
    limits = {axis: caps.get(axis) or budget for axis in winners}
    fill_in_turns(filling, winners, lambda axis: filling.sizes[axis] < limits[axis])
    grown = {axis: filling.sizes[axis] - sizes[axis] + len(pruned[axis]) for axis in scores}
    return _resizes(sizes, pruned, grown)


def _pools(
    scores: Scores,
    pool: int,
    floor: Floor,
    caps: Caps,
    reference: bool,
    held: Mapping[str, Collection[int]],
) -> tuple[list[_Offer], list[_Offer]]:
    """Return the units that axes may lose, lowest first, and those that may win, highest first."""
    losing: list[_Offer] = []
    winning: list[_Offer] = []
    for place, axis in enumerate(sorted(scores, key=natural)):
        size = len(scores[axis])
        lowest_first = ranked(scores[axis])[::-1]
        lowest = [unit for unit in lowest_first if unit not in held.get(axis, ())][:pool]
        may_lose = lowest[: max(0, min(pool, size - floor_of(floor, axis)))]
        may_win = may_lose if reference else lowest
        losing += [_Offer(float(scores[axis][unit]), place, axis, unit) for unit in may_lose]

        cap = caps.get(axis)
        room = pool if cap is None else max(0, cap - size)
        bids = [_Offer(-float(scores[axis][unit]), place, axis, unit) for unit in may_win]
        winning += sorted(bids)[:room]
    return sorted(losing), sorted(winning)


def _pick_swaps(
    losing: list[_Offer], winning: list[_Offer], swaps: int, renew: bool
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return the (axis, unit) to prune, and those whose axis grows, each in its order.

    A unit among the first `swaps` of both lists is left alone, or is in both results with `renew`.
    Winners beyond that number stay in the list, because a costly unit that is pruned may pay for
    several cheap ones.
    """
    prune = [offer.name for offer in losing]
    grow = [offer.name for offer in winning]
    if renew:
        return prune[: min(swaps, len(grow))], grow
    distinct = len({*prune, *grow})
    swaps = min(swaps, len(prune), len(grow), distinct // 2)
    both = {*prune[:swaps]} & {*grow[:swaps]}
    prune = [name for name in prune[:swaps] if name not in both]
    grow = [name for name in grow if name not in both and name not in prune]
    return prune, grow


def _grow_in_order(filling: Filling, waiting: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Buy one unit for each waiting entry that fits, in order. Return the entries that did not."""
    served: set[tuple[str, int]] = set()

    def fits(entry: tuple[str, int]) -> bool:
        return entry not in served and filling.affords(entry[0])

    def take(entry: tuple[str, int]) -> None:
        filling.add(entry[0])
        served.add(entry)

    fill_budget(waiting, lambda entry: 0.0, fits, take)
    return [entry for entry in waiting if entry not in served]


def _resizes(
    sizes: Mapping[str, int], pruned: Mapping[str, set[int]], grown: Mapping[str, int]
) -> Plan:
    """Return a `Resize` for every axis that loses or gains units."""
    plan: Plan = {}
    for axis, size in sizes.items():
        if pruned[axis] or grown[axis]:
            keep = tuple(unit for unit in range(size) if unit not in pruned[axis])
            plan[axis] = Resize(keep, grown[axis])
    return plan


# ---- sharing a total


def apportion(
    weights: Mapping[str, float],
    cost: CostModel,
    budget: int,
    floor: int = 1,
    caps: Caps | None = None,
) -> dict[str, int]:
    """Return sizes in proportion to weights, within floors and caps, by largest remainders.

    The real-valued sizes are w_a times one factor, clipped to floor and cap. The factor is the
    one that spends the budget. They are rounded down. The rest buys whole units by largest
    remainder, ties in natural order of the axes, and then whatever still fits. If every unit
    costs one, the budget is met exactly, unless all caps together cost less.

    Args:
        weights: axis -> its share, not negative. If all are zero, all count as equal.
        cost: cost model in the unit of the budget.
        budget: total, `cost.fixed` included, never exceeded.
        floor: least size of an axis.
        caps: axis -> largest size, None for no cap.
    Raises:
        UserError: if a weight is negative or not finite, or the floors cost more than the budget.
    """
    if any(not math.isfinite(weight) or weight < 0 for weight in weights.values()):
        raise UserError(
            f"Ranks cannot be shared out by {dict(weights)}: every weight has to be a number, "
            f"0 or more."
        )
    axes = sorted(weights, key=natural)
    floors_within(dict.fromkeys(axes, floor), cost, budget, floor)
    some_weight = any(weights.values())
    shares = {axis: float(weights[axis]) if some_weight else 1.0 for axis in axes}
    limits: dict[str, float] = {}
    for axis in axes:
        cap = (caps or {}).get(axis)
        limits[axis] = math.inf if cap is None else cap

    exact = _proportional_sizes(shares, cost, budget, floor, limits)
    rounded_down = {axis: math.floor(size + 1e-9) for axis, size in exact.items()}
    # The sort is stable, so ties stay in natural order.
    by_remainder = sorted(axes, key=lambda axis: rounded_down[axis] - exact[axis])
    filling = Filling(rounded_down, cost, budget)
    fill_in_turns(filling, by_remainder, lambda axis: filling.sizes[axis] < limits[axis])
    return filling.sizes


def _proportional_sizes(
    shares: Mapping[str, float],
    cost: CostModel,
    budget: int,
    floor: int,
    limits: Mapping[str, float],
) -> dict[str, float]:
    """Return real-valued sizes, factor times share within the bounds, that spend the budget.

    The factor is found by bisection.
    """

    def sizes_at(factor: float) -> dict[str, float]:
        return {
            axis: max(floor, min(factor * share, limits[axis])) for axis, share in shares.items()
        }

    low, high = 0.0, 1.0
    while cost.total(sizes_at(high)) < budget and high < 1e30:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if cost.total(sizes_at(middle)) <= budget:
            low = middle
        else:
            high = middle
    return sizes_at(low)


# ---- reallocating units


def reallocate(
    scores: Scores,
    cost: CostModel,
    budget: int,
    units: int,
    floor: Floor = 1,
    caps: Caps | None = None,
) -> Plan:
    """Prune the lowest units of all, and share as many fresh ones among axes that lost none.

    This is a round of ALoRA (arXiv:2403.16187). The shares are equal, and a remainder goes to
    the axes of higher mean score: 8 over three axes are 3, 3, 2. An axis without units lost none,
    so it may grow. It has no mean, and comes after all others. If every axis lost a unit, nothing
    is added, and the total shrinks for good. The last unit of all is never pruned. If units cost
    unequally, fresh units are bought in turns, as long as they cost no more than the pruned ones.

    Args:
        scores: axis -> (units,), higher is kept.
        cost: cost model in the unit of the budget.
        budget: total not to be exceeded.
        units: number of units to prune, fewer if the floors forbid it.
        floor: least number of units of an axis.
        caps: axis -> largest number of units, None for no cap.
    """
    caps = caps or {}
    axes = sorted(scores, key=natural)
    sizes = {axis: len(values) for axis, values in scores.items()}
    pruned = _lowest_of_all(scores, axes, units, floor)
    lost = sum(len(gone) for gone in pruned.values())
    if lost == 0:
        return {}

    budget = min(budget, cost.total(sizes))
    remaining = {axis: sizes[axis] - len(pruned[axis]) for axis in axes}
    equal_costs = all(cost.marginal(axis, remaining) == 1 for axis in axes)
    filling = Filling(remaining, cost, budget)

    def may_grow(axis: str) -> bool:
        # With equal costs no more units are added than were pruned.
        if equal_costs and sum(filling.sizes.values()) == sum(sizes.values()):
            return False
        cap = caps.get(axis)
        return cap is None or filling.sizes[axis] < cap

    untouched = [axis for axis in axes if not pruned[axis]]
    winners = sorted(untouched, key=lambda axis: -_mean(scores[axis]))
    fill_in_turns(filling, winners, may_grow)
    grown = {axis: filling.sizes[axis] - remaining[axis] for axis in axes}
    return _resizes(sizes, pruned, grown)


def _mean(values: Tensor) -> float:
    """Return the mean score of an axis. One without units comes last."""
    return float(values.double().mean()) if len(values) else -math.inf


def _lowest_of_all(
    scores: Scores, axes: list[str], units: int, floor: Floor
) -> dict[str, set[int]]:
    """Return axis -> its pruned units: the lowest scores of all axes, within the floors.

    One unit of all stays, or nothing could be trained and scored any more.
    """
    entries: list[tuple[float, int, int]] = []
    for place, axis in enumerate(axes):
        entries += [(score, place, unit) for unit, score in enumerate(scores[axis].tolist())]
    pruned: dict[str, set[int]] = {axis: set() for axis in axes}
    left = min(units, len(entries) - 1)
    for _, place, unit in sorted(entries):
        axis, gone = axes[place], pruned[axes[place]]
        if left > 0 and len(scores[axis]) - len(gone) > floor_of(floor, axis):
            gone.add(unit)
            left -= 1
    return pruned
