"""Spend a budget greedily, one unit at a time. Pure."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from adaptrank._errors import UserError
from adaptrank.axes import CostModel

Candidate = TypeVar("Candidate")

Floor = int | Mapping[str, int]
"""Least number of units: of every axis alike, or of each axis by its key."""


class Filling:
    """Sizes that grow towards a budget, and their total cost.

    Args:
        sizes: axis -> units at the start. The mapping is copied.
        cost: cost model in the unit of the budget.
        budget: largest total cost, `cost.fixed` included.
    """

    def __init__(self, sizes: Mapping[str, int], cost: CostModel, budget: int) -> None:
        self.sizes = dict(sizes)
        self.cost = cost
        self.budget = budget
        self.total = cost.total(self.sizes)

    def affords(self, axis: str) -> bool:
        """Return whether one more unit of the axis stays within the budget."""
        return self.total + self.cost.marginal(axis, self.sizes) <= self.budget

    def add(self, axis: str) -> None:
        """Add one unit to the axis."""
        self.total += self.cost.marginal(axis, self.sizes)
        self.sizes[axis] += 1

    def remove(self, axis: str) -> None:
        """Take one unit from the axis."""
        self.sizes[axis] -= 1
        self.total -= self.cost.marginal(axis, self.sizes)


def fill_budget(
    candidates: Sequence[Candidate],
    value: Callable[[Candidate], float],
    fits: Callable[[Candidate], bool],
    take: Callable[[Candidate], None],
) -> None:
    """Take the fitting candidate of the highest value, again and again, until none fits.

    Both functions have to be monotone. The value of a candidate never rises, and a candidate that
    does not fit never fits later. Marginal costs only grow, so both hold for units of rank axes.
    Values are recomputed only when a candidate reaches the top of a heap.

    Args:
        candidates: axes, units or the like, in the order in which ties are broken.
        value: current value of a candidate that fits.
        fits: whether a candidate may be taken now. It must become false once a candidate is
            used up.
        take: carry out the choice. The same candidate is offered again afterwards.
    """
    heap = [(-value(entry), i) for i, entry in enumerate(candidates) if fits(entry)]
    heapq.heapify(heap)
    while heap:
        queued, index = heapq.heappop(heap)
        candidate = candidates[index]
        if not fits(candidate):
            continue
        current = -value(candidate)
        if current > queued:
            # Its value has fallen since it was queued, so another one may be ahead of it now.
            heapq.heappush(heap, (current, index))
            continue
        take(candidate)
        if fits(candidate):
            heapq.heappush(heap, (-value(candidate), index))


def fill_in_turns(
    filling: Filling, axes: Sequence[str], may_grow: Callable[[str], bool]
) -> dict[str, int]:
    """Give the axes one unit each, round after round, until no further unit fits.

    Args:
        filling: sizes and budget, changed in place.
        axes: axes in the order of their turns.
        may_grow: limit of an axis beside the budget. It must not become true again.
    Returns:
        axis -> units it received.
    """
    received = dict.fromkeys(axes, 0)

    def fits(axis: str) -> bool:
        return may_grow(axis) and filling.affords(axis)

    def take(axis: str) -> None:
        filling.add(axis)
        received[axis] += 1

    # The axis with the fewest new units is next.
    fill_budget(axes, lambda axis: -received[axis], fits, take)
    return received


def value_per_cost(value: float, price: int) -> float:
    """Return the value of a unit over its price. A negative value is multiplied by it."""
    price = max(price, 1)
    if value >= 0:
        return value / price
    return value * price


def floor_of(floor: Floor, axis: str) -> int:
    """Return the least size of an axis."""
    return floor if isinstance(floor, int) else floor[axis]


def floors_within(
    sizes: Mapping[str, int], cost: CostModel, budget: int, floor: Floor
) -> dict[str, int]:
    """Return the least size of each axis, min(floor, size).

    Raises:
        UserError: if these sizes alone cost more than the budget.
    """
    floors = {axis: min(floor_of(floor, axis), size) for axis, size in sizes.items()}
    least = cost.total(floors)
    if least > budget:
        raise UserError(
            f"A budget of {budget} is below {least}, the cost of the units that the axes keep in "
            f"any case. Raise it, or lower `floor`."
        )
    return floors
