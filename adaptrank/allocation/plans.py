"""Pure: importance, cost, budget -> what to keep, close and grow. Deterministic; nothing here touches a tensor of a model."""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.axes import CostModel, natural

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class Resize:
    """Keep these units, in this order, and add `grow` fresh ones."""

    keep: tuple[int, ...]
    grow: int = 0


@dataclass(frozen=True)
class Close:
    """Set these units to zero and open all others; tensors keep their size."""

    units: tuple[int, ...]


Plan = dict[str, Resize | Close]


def ranked(scores: Tensor) -> list[int]:
    """Units from the most to the least important; ties fall to the lower index."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda unit: (-values[unit], unit))


def keep_best(scores: Scores, cost: CostModel, budget: int, floor: int = 1) -> Plan:
    """Keep the units with most importance per cost, never over the budget.

    Each axis keeps its `floor` best units. Then one unit at a time, the highest score per marginal cost first; ties fall
    to the natural order of the axes. With costs of one the budget is met exactly, with others the next unit that could
    be kept would no longer fit.

    Args:
        scores: axis -> (units,), higher is kept.
        cost: in the unit of the budget.
        budget: total after the plan, `cost.fixed` included.
        floor: least number of units an axis keeps.
    Returns:
        A `Resize` for every axis that loses units.
    Raises:
        ValueError: where the floors alone cost more than the budget.
    """
    order = {axis: ranked(values) for axis, values in scores.items()}
    sizes = {axis: min(floor, len(units)) for axis, units in order.items()}
    total = cost.total(sizes)
    if total > budget:
        raise UserError(
            f"A budget of {budget} is below {total}, the cost of {floor} unit(s) on each axis; raise it, or lower `floor`."
        )

    def value(axis: str) -> float:
        score = float(scores[axis][order[axis][sizes[axis]]])
        price = max(cost.marginal(axis, sizes), 1)
        return score / price if score >= 0 else score * price

    place = {axis: index for index, axis in enumerate(sorted(scores, key=natural))}
    heap = [(-value(axis), place[axis], axis) for axis in scores if sizes[axis] < len(order[axis])]
    heapq.heapify(heap)
    while heap:
        stale, _, axis = heapq.heappop(heap)
        if (
            -value(axis) > stale
        ):  # a neighbour grew, and this unit costs more than when it was queued
            heapq.heappush(heap, (-value(axis), place[axis], axis))
            continue
        price = cost.marginal(axis, sizes)
        if total + price > budget:
            continue  # nor will any further unit of this axis fit: marginal costs only grow
        total += price
        sizes[axis] += 1
        if sizes[axis] < len(order[axis]):
            heapq.heappush(heap, (-value(axis), place[axis], axis))
    return {
        axis: Resize(tuple(sorted(units[: sizes[axis]])))
        for axis, units in order.items()
        if sizes[axis] < len(units)
    }


def exchange(
    scores: Scores,
    cost: CostModel,
    budget: int,
    swaps: int,
    pool: int = 2,
    floor: int = 1,
    caps: Mapping[str, int | None] | None = None,
    reference: bool = False,
) -> Plan:
    """ElaLoRA's exchange (arXiv:2504.00254), with two pools: the weakest units go, axes whose weakest still matter grow.

    Every axis offers its `pool` lowest units. Of those it may lose (never below `floor`) the `swaps` lowest scores are
    pruned; the `swaps` highest scores win a fresh unit each for their axis (never above its cap). One prune and what its
    cost pays for at a time, so that the total never exceeds the budget; with costs of one it stays the same, with
    others what is left over buys no further unit of a winner.
    A unit that is chosen for both is left alone.

    `reference=True` is the released rule: one pool for both, from which an axis at the floor is absent, so that it can
    never grow again.

    Args:
        scores: axis -> (units,), higher is kept.
        cost: in the unit of the budget.
        budget: total not to be exceeded.
        swaps: number of units to prune and to grow; fewer where the pools are small.
        pool: units an axis offers.
        floor: least number of units of an axis.
        caps: axis -> largest number of units, None for no cap.
        reference: use the single pool of the released code.
    """
    caps = caps or {}
    sizes = {axis: len(values) for axis, values in scores.items()}
    losing: list[tuple[float, int, str, int]] = []
    winning: list[tuple[float, int, str, int]] = []
    for place, axis in enumerate(sorted(scores, key=natural)):
        lowest = ranked(scores[axis])[::-1]
        offered = [(float(scores[axis][unit]), place, axis, unit) for unit in lowest[:pool]]
        may_lose = max(0, min(pool, sizes[axis] - floor))
        losing += offered[:may_lose]
        cap = caps.get(axis)
        room = pool if cap is None else max(0, cap - sizes[axis])
        may_win = sorted(
            (-score, p, a, u) for score, p, a, u in (offered[:may_lose] if reference else offered)
        )
        winning += may_win[:room]
    prune = [(axis, unit) for _, _, axis, unit in sorted(losing)]
    grow = [(axis, unit) for _, _, axis, unit in sorted(winning)]
    swaps = min(swaps, len(prune), len(grow), len({*prune, *grow}) // 2)
    both = {*prune[:swaps]} & {*grow[:swaps]}
    prune = [entry for entry in prune[:swaps] if entry not in both]
    grow = [entry for entry in grow if entry not in both and entry not in prune]
    winners = list(dict.fromkeys(axis for axis, _ in grow)) if prune else []

    total = cost.total(sizes)
    pruned: dict[str, set[int]] = {axis: set() for axis in scores}
    grown = dict.fromkeys(scores, 0)
    for axis, unit in prune:
        pruned[axis].add(unit)
        sizes[axis] -= 1
        total -= cost.marginal(axis, sizes)
        while entry := next(
            (e for e in grow if total + cost.marginal(e[0], sizes) <= budget), None
        ):
            grow.remove(entry)
            total += cost.marginal(entry[0], sizes)
            sizes[entry[0]] += 1
            grown[entry[0]] += 1
    # Cheap winners may not spend what dear units freed: go round once more, until not one more unit fits.
    while fitting := [
        a
        for a in winners
        if sizes[a] < (caps.get(a) or budget) and total + cost.marginal(a, sizes) <= budget
    ]:
        for axis in fitting:
            if total + cost.marginal(axis, sizes) <= budget:
                total += cost.marginal(axis, sizes)
                sizes[axis] += 1
                grown[axis] += 1
    return {
        axis: Resize(
            tuple(unit for unit in range(len(values)) if unit not in pruned[axis]), grown[axis]
        )
        for axis, values in scores.items()
        if pruned[axis] or grown[axis]
    }


def apportion(
    weights: Mapping[str, float],
    cost: CostModel,
    budget: int,
    floor: int = 1,
    caps: Mapping[str, int | None] | None = None,
) -> dict[str, int]:
    """Sizes in proportion to weights, within floors and caps, by largest remainders; never over the budget.

    The real sizes are w_a times one factor, clipped to floor and cap, where the factor is the one that spends the budget.
    They are rounded down, and what is left buys whole units by largest remainder, ties in natural order of the axes, then whatever
    still fits. With costs of one the budget is met exactly, unless all caps together cost less.

    Args:
        weights: axis -> its share, not negative; all zero counts as all equal.
        cost: in the unit of the budget.
        budget: total, `cost.fixed` included.
        floor: least size of an axis.
        caps: axis -> largest size, None for no cap.
    Raises:
        ValueError: where a weight is negative or no number, or the floors alone cost more than the budget.
    """
    if any(not math.isfinite(weight) or weight < 0 for weight in weights.values()):
        raise UserError(
            f"Ranks cannot be shared out by {dict(weights)}: every weight has to be a number, 0 or more."
        )
    axes = sorted(weights, key=natural)
    shares = {axis: float(weights[axis]) if any(weights.values()) else 1.0 for axis in axes}
    bounds = {axis: (caps or {}).get(axis) for axis in axes}
    least = cost.total(dict.fromkeys(axes, floor))
    if least > budget:
        raise UserError(
            f"A budget of {budget} is below {least}, the cost of {floor} unit(s) on each axis; raise it, or lower `floor`."
        )

    def real(factor: float) -> dict[str, float]:
        return {
            a: max(floor, min(factor * shares[a], math.inf if (c := bounds[a]) is None else c))
            for a in axes
        }

    low, high = 0.0, 1.0
    while cost.total(real(high)) < budget and high < 1e30:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.total(real(middle)) <= budget else (low, middle)
    exact = real(low)
    sizes = {axis: math.floor(size + 1e-9) for axis, size in exact.items()}
    order = sorted(
        axes, key=lambda axis: sizes[axis] - exact[axis]
    )  # stable: ties stay in natural order
    bought = True
    while (
        bought
    ):  # more than one round only where all remainders are spent, or units cost unequally
        bought = False
        for axis in order:
            cap = bounds[axis]
            if (cap is None or sizes[axis] < cap) and cost.total(sizes) + cost.marginal(
                axis, sizes
            ) <= budget:
                sizes[axis] += 1
                bought = True
    return sizes


def reallocate(
    scores: Scores,
    cost: CostModel,
    budget: int,
    units: int,
    floor: int = 1,
    caps: Mapping[str, int | None] | None = None,
) -> Plan:
    """ALoRA's round (arXiv:2403.16187): the lowest units of all go, and the axes that lost none share as many fresh ones.

    Equal shares, a remainder to the axes of higher mean score: 8 over three are 3, 3, 2. If every axis lost one nothing is added,
    and the total shrinks, for good. With unequal costs fresh units are bought, one a round and axis, as long as they cost no more than
    those that went.

    Args:
        scores: axis -> (units,), higher is kept.
        cost: in the unit of the budget.
        budget: total not to be exceeded.
        units: number to prune, fewer where floors forbid.
        floor: least number of units of an axis.
        caps: axis -> largest number of units, None for no cap.
    """
    order = sorted(scores, key=natural)
    lowest = sorted(
        (float(s), place, unit)
        for place, axis in enumerate(order)
        for unit, s in enumerate(scores[axis].tolist())
    )
    pruned: dict[str, set[int]] = {axis: set() for axis in order}
    for _, place, unit in lowest:
        axis = order[place]
        if sum(map(len, pruned.values())) < units and len(scores[axis]) - len(pruned[axis]) > floor:
            pruned[axis].add(unit)
    sizes = {axis: len(scores[axis]) - len(pruned[axis]) for axis in order}
    lost = sum(map(len, pruned.values()))
    winners = sorted(
        (axis for axis in order if not pruned[axis]),
        key=lambda axis: -float(scores[axis].double().mean()),
    )
    grown, bought = dict.fromkeys(order, 0), True
    budget = min(budget, cost.total({axis: len(values) for axis, values in scores.items()}))
    priced = any(cost.marginal(axis, sizes) != 1 for axis in order)
    while bought and (priced or sum(grown.values()) < lost):
        bought = False
        for axis in winners if lost else ():
            cap = (caps or {}).get(axis)
            room = cap is None or sizes[axis] < cap
            if not priced and sum(grown.values()) == lost:
                break
            if room and cost.total(sizes) + cost.marginal(axis, sizes) <= budget:
                sizes[axis] += 1
                grown[axis] += 1
                bought = True
    return {
        axis: Resize(
            tuple(u for u in range(len(scores[axis])) if u not in pruned[axis]), grown[axis]
        )
        for axis in scores
        if pruned[axis] or grown[axis]
    }


def in_steps(cost: CostModel, steps: Mapping[str, int], fixed: Mapping[str, int]) -> CostModel:
    """The same costs where a size counts steps of so many units, and some axes stay as they are.

    Args:
        cost: of units.
        steps: axis -> units a step.
        fixed: axis -> the units it keeps; what they cost is fixed.
    """
    rest, terms = cost.fixed, []
    for factor, axes in cost.terms:
        price = factor * math.prod(fixed[axis] if axis in fixed else steps[axis] for axis in axes)
        free = tuple(axis for axis in axes if axis not in fixed)
        if free:
            terms.append((price, free))
        else:
            rest += price
    return CostModel(rest, tuple(terms))
