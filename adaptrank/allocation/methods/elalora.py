"""ElaLoRA: ranks move from layers whose weakest units matter little to layers where they matter."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank._options import DECAY, NOT_NEGATIVE
from adaptrank.allocation.checks import check_can_prune
from adaptrank.allocation.context import Axes
from adaptrank.allocation.events import Event, Proposal
from adaptrank.allocation.plans import Plan, Scores, exchange
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.renamed import renamed_rule
from adaptrank.allocation.schedules import late_drop
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import CostModel, RankAxis


class UnitAges(TrackedTensors):
    """Events that each unit has lived through since it was added."""

    def age(self, axis: RankAxis, start: int) -> Tensor:
        """Return the ages of the units of an axis, (units,). Fresh units start at zero.

        Args:
            axis: the axis.
            start: age of the units that a run begins with.
        """
        return self.track(axis, "age", torch.full((len(axis),), float(start)))

    def younger_than(self, events: int, axes: Axes) -> dict[str, list[int]]:
        """Return axis key -> its units that have lived through fewer events."""
        young = {}
        for key, axis in axes.items():
            young[key] = (self.age(axis, events) < events).nonzero().flatten().tolist()
        return young

    def grow_older(self, axes: Axes) -> None:
        """Add the event that is being carried out to the age of every unit."""
        for axis in axes.values():
            self.age(axis, 0).add_(1)


class ElaLoRA(Policy[UnitAges]):
    """Prune and expand at a constant total.

    Each event exchanges up to b (1 - p^3) units, with p from 0 to 1 and halves rounded up. Every
    axis offers its `pool` least important units. The b lowest of all are pruned. The b highest win
    a fresh unit for their axis.

    There are two rules. With `rule="published"`, the released one, a single pool serves both
    directions, and an axis at its floor offers nothing. So an axis that fell to one unit can never
    grow again. With `rule="two_pools"`, the default, each direction has a pool of its own, and such
    an axis still bids for growth. It decides otherwise in two of three random states. Tables and
    reports call it "ElaLoRA (two pools)".

    Scores are those of AdaLoRA: running sensitivity times uncertainty of every element, without
    bias correction. Fresh units start at a score of zero, so intervals should be long (20 steps
    and more) to let them prove themselves.

    With `cooldown=k` a fresh unit is in no pool for k events: it is neither pruned nor bids. The
    released code has no such rule, which is `cooldown=0`.

    Source: arXiv:2504.00254; rules from the authors' code, which was read. The text of the paper
    was not. Its defaults are 4 swaps, a pool of 2, betas of 0.85, and an orthogonality weight of
    0.1 (`SVD(orth=0.1)`).

    Args:
        swaps: b, the largest number of units to exchange at an event.
        pool: k, the number of units that an axis offers.
        rule: "two_pools", the repaired rule, or "published", the released one.
        importance: score of a unit, any of `scores.IMPORTANCES`.
        beta: decay of the running averages.
        unit: what stays constant, "ranks" or "parameters" (never above, and within one unit of
            the start).
        floor: smallest number of units of an axis; 1 as in the authors' code, where an axis offers
            at most all of its units but one. With 0 an axis that lost its last unit stays empty:
            it has none to offer.
        cooldown: number of events for which a fresh unit is not moved again.
        every, warmup, final, seed: as in `Policy`.
        cap: largest size of an axis. None is four times its size at the start, and no cap for the
            published rule.
        two_pools: earlier name of `rule`: True is "two_pools", and False "published".
    Raises:
        ValueError: for arguments out of range; at the start, if every axis is at its floor.
    """

    source = "arXiv:2504.00254"
    ranges: ClassVar = {"beta": DECAY, "cooldown": NOT_NEGATIVE}
    requires = frozenset({"grow"})

    def __init__(
        self,
        swaps: int = 4,
        pool: int = 2,
        rule: Literal["two_pools", "published"] = "two_pools",
        importance: str = "sensitivity_uncertainty",
        beta: float = 0.85,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 50,
        warmup: int | float = 0.1,
        final: int | float = 0.3,
        floor: int = 1,
        cap: int | None = None,
        seed: int = 0,
        two_pools: bool | None = None,
        cooldown: int = 0,
    ) -> None:
        super().__init__(None, unit, every, warmup, final, floor, cap, seed)
        if two_pools is not None:
            meant = _rule_of(two_pools)
            rule = renamed_rule("ElaLoRA", f"two_pools={two_pools}", meant, rule, "two_pools")
        if rule not in ("two_pools", "published"):
            raise UserError(f"rule={rule!r} is unknown; use 'two_pools' or 'published'.")
        if swaps < 0 or pool < 1:
            raise UserError(
                f"swaps={swaps}, pool={pool}: exchange at least 0 units, and offer at least 1 of "
                f"each axis."
            )
        self.swaps, self.pool, self.rule, self.cooldown = swaps, pool, rule, cooldown
        self.importance, self.beta = importance, beta

    @property
    def variant(self) -> str:
        return "" if self.rule == "published" else "two pools"

    @classmethod
    def present_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        present = dict(arguments)
        two_pools = present.pop("two_pools", None)
        if two_pools is not None:
            present["rule"] = _rule_of(two_pools)
        return present

    def init_state(self, axes: Axes) -> UnitAges:
        state = UnitAges()
        if self.cooldown:
            for axis in axes.values():
                state.age(axis, self.cooldown)
        return state

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        return self._exchange(scores, cost, budget, step, {})

    # ---- optional members

    def propose(
        self, state: UnitAges, scores: Scores, cost: CostModel, budget: int, step: int
    ) -> Proposal:
        if not self.cooldown:
            return super().propose(state, scores, cost, budget, step)
        young = state.younger_than(self.cooldown, self.run.axes)
        return Proposal(self._exchange(scores, cost, budget, step, young))

    def carry_out(
        self, state: UnitAges, plan: Plan, step: int, apply: Callable[[Plan, int], Event]
    ) -> Event:
        if self.cooldown:
            state.grow_older(self.run.axes)
        return apply(plan, step)

    def acts_at(self, step: int) -> bool:
        if not self.swaps:  # a run without swaps is a control, and is not refused
            return True
        return late_drop(self.swaps, self.run.phases.progress(step)) > 0

    def caps(self) -> dict[str, int | None]:
        caps = super().caps()
        if self.cap is not None or self.rule == "published":
            return caps
        start = self.run.start_sizes
        return {key: min(4 * start[key], bound or 4 * start[key]) for key, bound in caps.items()}

    def _exchange(
        self,
        scores: Scores,
        cost: CostModel,
        budget: int,
        step: int,
        held: Mapping[str, Collection[int]],
    ) -> Plan:
        swaps = late_drop(self.swaps, self.run.phases.progress(step))
        return exchange(
            scores,
            cost,
            budget,
            swaps,
            self.pool,
            self.floors(),
            self.caps(),
            reference=self.rule == "published",
            held=held,
        )

    def check_start(self, sizes: Mapping[str, int]) -> None:
        check_can_prune(self, sizes)


def _rule_of(two_pools: bool) -> Literal["two_pools", "published"]:
    return "two_pools" if two_pools else "published"
