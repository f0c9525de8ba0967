"""DynamicRank: prune to a falling budget by the Frobenius norm of each unit's update."""

from typing import ClassVar, Literal, cast

from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation.context import Axes
from adaptrank.allocation.plans import Plan, Scores, keep_best
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.schedules import cubic, late_cubic
from adaptrank.allocation.scores.elements import zeros
from adaptrank.allocation.scores.gradient import magnitude
from adaptrank.allocation.soft_pruning import open_best
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import CostModel, RankAxis

EPSILON = 1e-8
"""Added to the norm of a layer's update."""


class UnitShares(TrackedTensors):
    """Running share of each unit in the norm of its layer's update."""

    def share(self, axis: RankAxis, like: Tensor) -> Tensor:
        """Return the running shares of an axis, (units,); they start at zero."""
        return self.track(axis, "share", zeros(like))


class DynamicRank(Policy[UnitShares]):
    """Prune the units whose share in the norm of their layer's update is smallest.

    The update of a layer is a sum of units, D = sum_i D_i. The score of a unit is a running average
    s <- b s + (1 - b) |D_i| / (|D| + 1e-8), with Frobenius norms. For a rank-one unit |D_i| is the
    product of the norms of its factors. |D| is the norm of the sum where a unit is a column of one
    factor times a row of the other. Elsewhere |D|^2 is taken as sum_i |D_i|^2.

    The budget is start - floor((start - budget) p^3), with p from 0 to 1 between the warm-up and
    the final phase, and at least one below the start. So most units go late, where AdaLoRA's go
    early. With `rule="early"` the budget is AdaLoRA's, and |D|^2 is the sum of squares everywhere,
    as in an earlier version. Tables and reports call that "DynamicRank (early)".

    Pruning is soft: an event closes units. They keep their slices and their gradients, and may be
    chosen at the next event. The last event removes closed units physically. With `soft=False`
    every event removes units. No gradient is needed, so the score costs next to nothing. A unit
    that is alone in its layer has a share of 1, so the last unit of a layer goes only if the budget
    is below the number of layers.

    Source: arXiv:2405.17357 ("DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank
    Distribution"). The rules are from the authors' code, MIkumikumi0116/DoRA at 1c76b34: decay 0.9,
    a start of 1.5 times the final rank, rounded up, a warm-up of 0.15, a final phase of 0.5, an
    event every 100 steps. Its penalty on the variance of the factors (0.1 times their mean
    variance) is left out. The name avoids confusion with the parameterization DoRA.

    Args:
        budget: final total in `unit`; None is the total at the start divided by 1.5.
        soft: close units until the last event. False removes them at each event.
        rule: "published", or "early".
        beta: decay of the running average, from 0 to below 1.
        floor: smallest number of units of an axis; 0, since the paper names no floor.
        unit, every, warmup, final, seed: as in `Policy`.
    Raises:
        ValueError: for an unknown rule or a decay out of range.
    """

    source = "arXiv:2405.17357"
    earlier: ClassVar = {"soft": False, "rule": "early"}

    def __init__(
        self,
        budget: int | None = None,
        soft: bool = True,
        rule: Literal["published", "early"] = "published",
        beta: float = 0.9,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 10,
        warmup: int | float = 0.15,
        final: int | float = 0.5,
        floor: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, None, seed)
        if not 0 <= beta < 1:
            raise UserError(f"beta={beta}: the decay is from 0 to below 1; use 0.9.")
        if rule not in ("published", "early"):
            raise UserError(f"rule={rule!r} is unknown; use 'published' or 'early'.")
        self.soft, self.rule, self.beta = soft, rule, beta

    @property
    def variant(self) -> str:
        return "" if self.rule == "published" else "early"

    def init_state(self, axes: Axes) -> UnitShares:
        return UnitShares()

    def update(self, state: UnitShares, axes: Axes) -> None:
        for axis in axes.values():
            share = unit_shares(axis, self.rule == "published")
            state.share(axis, share).lerp_(share, 1 - self.beta)

    def score_units(self, state: UnitShares, axes: Axes) -> Scores:
        return {key: state.share(axis, magnitude(axis)) for key, axis in axes.items()}

    def budget_at(self, step: int) -> int:
        start = self.run.start_total
        target = int(start / 1.5) if self.budget is None else self.budget
        curve = late_cubic if self.rule == "published" else cubic
        return curve(start, target, self.run.phases.progress(step))

    @property
    def only_prunes(self) -> bool:
        return True

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        closes = self.soft and step < self.run.phases.end
        prune = open_best if closes else keep_best
        return prune(scores, cost, budget, self.floors())


def unit_shares(axis: RankAxis, norm_of_sum: bool) -> Tensor:
    """Return |D_i| / (|D| + 1e-8) of the units of an axis, (units,).

    Args:
        axis: the axis.
        norm_of_sum: take |D| as the norm of the sum, where units are products of two vectors.
    """
    factors = _rank_one_factors(axis) if norm_of_sum else None
    if factors is None:
        norms = magnitude(axis)
        squared = norms.square().sum()
    else:
        U, V = factors
        norms = cast(Tensor, U.norm(dim=0) * V.norm(dim=1))
        # |U V|^2 is the inner product of two Gram matrices (r, r), and needs no (m, n) matrix.
        squared = ((U.T @ U) * (V @ V.T)).sum()
    return norms / (squared.clamp_min(0).sqrt() + EPSILON)


def _rank_one_factors(axis: RankAxis) -> tuple[Tensor, Tensor] | None:
    """Return (U (m, r), V (r, n)) whose products of column and row are the units, or None."""
    if len(axis.members) != 1 or "matrix_rank" not in axis.capabilities:
        return None
    factors = axis.members[0][0].factors()
    if factors is None or factors[0].shape[1] != len(axis):
        return None
    return factors[0].detach(), factors[1].detach()
