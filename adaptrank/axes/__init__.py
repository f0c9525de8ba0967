"""Rank axes: the units of every method, their cost, and their resizing with optimizer state."""

from adaptrank.axes.axis import Gate, RankAxis
from adaptrank.axes.cost import CostModel, cost_model, rank_cost
from adaptrank.axes.groups import PRUNED, Groups, compact, find_groups
from adaptrank.axes.model_axes import CLOSED, fit_ranks, natural, rank_axes
from adaptrank.axes.optimizer_state import Optimizers, check_optimizer
from adaptrank.axes.seeding import generator
from adaptrank.axes.slot import Slot

__all__ = [
    "CLOSED",
    "PRUNED",
    "CostModel",
    "Gate",
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
