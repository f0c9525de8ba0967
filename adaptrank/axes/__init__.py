"""Rank axes: the units of every method, their cost, and their resizing with optimizer state."""

from adaptrank.axes.axis import Gate, RankAxis
from adaptrank.axes.cost import CostModel, cost_model, rank_cost
from adaptrank.axes.forgetting import forget_state, prune_moments
from adaptrank.axes.groups import PRUNED, Groups, compact, find_groups
from adaptrank.axes.load_hook import fit_on_load, stop_fitting
from adaptrank.axes.model_axes import CLOSED, fit_ranks, natural, rank_axes
from adaptrank.axes.optimizer_state import Follower, UnitChange, shift_copies
from adaptrank.axes.quantized_tensors import dequantized
from adaptrank.axes.seeding import generator
from adaptrank.axes.slot import Slot
from adaptrank.axes.stacks import resize_stack
from adaptrank.axes.state_roles import (
    STATE_ROLES,
    Optimizers,
    Role,
    check_optimizer,
    holds,
    misfit_of_state,
    optimized_tensors,
    states_of,
)

__all__ = [
    "CLOSED",
    "PRUNED",
    "STATE_ROLES",
    "CostModel",
    "Follower",
    "Gate",
    "Groups",
    "Optimizers",
    "RankAxis",
    "Role",
    "Slot",
    "UnitChange",
    "check_optimizer",
    "compact",
    "cost_model",
    "dequantized",
    "find_groups",
    "fit_on_load",
    "fit_ranks",
    "forget_state",
    "generator",
    "holds",
    "misfit_of_state",
    "natural",
    "optimized_tensors",
    "prune_moments",
    "rank_axes",
    "rank_cost",
    "resize_stack",
    "shift_copies",
    "states_of",
    "stop_fitting",
]
