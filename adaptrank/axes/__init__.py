"""Rank axes: the units of every method, their cost, and their resizing with optimizer state."""

from adaptrank.axes.axis import (
    CostModel,
    Optimizers,
    RankAxis,
    Slot,
    check_optimizer,
    cost_model,
    fit_ranks,
    generator,
    natural,
    rank_axes,
    rank_cost,
)
from adaptrank.axes.groups import PRUNED, Groups, compact, find_groups

__all__ = [
    "PRUNED",
    "CostModel",
    "Groups",
    "Optimizers",
    "RankAxis",
    "Slot",
    "check_optimizer",
    "compact",
    "cost_model",
    "find_groups",
    "fit_ranks",
    "generator",
    "natural",
    "rank_axes",
    "rank_cost",
]
