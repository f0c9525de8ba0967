"""Soft pruning: units are closed rather than removed, and may come back until the last event."""

from adaptrank.allocation.budget import Floor
from adaptrank.allocation.plans import Close, Plan, Scores, keep_best, kept_units, ranked
from adaptrank.axes import CostModel


def open_best(scores: Scores, cost: CostModel, budget: int, floor: Floor) -> Plan:
    """Return a plan that closes every unit which `keep_best` would remove, and opens the others.

    Args:
        scores: axis -> (units,), higher stays open.
        cost: cost model in the unit of the budget.
        budget: total cost of the open units.
        floor: least number of open units of an axis.
    """
    sizes = kept_units(keep_best(scores, cost, budget, floor))
    return {key: Close(tuple(sorted(ranked(scores[key])[size:]))) for key, size in sizes.items()}
