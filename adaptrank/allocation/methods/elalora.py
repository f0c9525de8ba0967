"""ElaLoRA: ranks move from layers whose weakest units do not matter to layers whose weakest still do."""

from collections.abc import Mapping
from typing import Literal

from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.plans import Plan, Scores, exchange
from adaptrank.allocation.schedules import late_drop
from adaptrank.axes import CostModel


class ElaLoRA(Allocator):
    """Prune and expand at constant total: each event exchanges up to b (1 - p^3) units, p from 0 to 1 (halves round up).

    Every axis offers its `pool` least important units. The b lowest of all are pruned; the b highest win a fresh unit
    for their axis. Each direction has a pool of its own: in the released single pool an axis that fell to one unit can
    never grow again (`two_pools=False` reproduces it).

    Scores are AdaLoRA's: running sensitivity times uncertainty of every element, no bias correction. Fresh units start at
    zero score, so intervals should be long (20 steps and more) to let them prove themselves.

    Source: arXiv:2504.00254; the rules are those of the authors' code, which was read, the paper's text was not. Its
    defaults: swaps 4, pool 2, betas 0.85, an orthogonality weight of 0.1 (`SVD(orth=0.1)`).
    Args:
        swaps: b, most units to exchange at an event.
        pool: k, units an axis offers.
        two_pools: the repaired rule; False for the released one.
        importance: score of a unit, any of `scores.IMPORTANCES`.
        beta: of the running averages.
        unit: what stays constant, "ranks" or "parameters" (never above, and within one unit of the start).
        every, warmup, final, floor, seed: as in `Allocator`.
        cap: largest size of an axis; None is four times its size at the start.
    """

    source = "arXiv:2504.00254"
    requires = frozenset({"grow"})

    def __init__(
        self,
        swaps: int = 4,
        pool: int = 2,
        two_pools: bool = True,
        importance: str = "sensitivity_uncertainty",
        beta: float = 0.85,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 50,
        warmup: int | float = 0.1,
        final: int | float = 0.3,
        floor: int = 1,
        cap: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(None, unit, every, warmup, final, floor, cap, seed)
        if swaps < 0 or pool < 1:
            raise UserError(
                f"swaps={swaps}, pool={pool}: exchange at least 0 units, and offer at least 1 of each axis."
            )
        self.swaps, self.pool, self.two_pools = swaps, pool, two_pools
        self.importance, self.beta = importance, beta

    def acts_at(self, step: int) -> bool:
        return not self.swaps or late_drop(self.swaps, self.phases.progress(step)) > 0

    def caps(self) -> dict[str, int | None]:
        caps = super().caps()
        if self.cap is not None:
            return caps
        return {
            key: min(4 * self._start[key], bound or 4 * self._start[key])
            for key, bound in caps.items()
        }

    def begin(self, sizes: Mapping[str, int]) -> None:
        if all(size <= self.floor for size in sizes.values()):
            raise UserError(
                f"ElaLoRA would never act: every axis starts at its floor of {self.floor} unit(s), and none can be pruned; start "
                f"with a higher rank."
            )

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        swaps = late_drop(self.swaps, self.phases.progress(step))
        return exchange(
            scores,
            cost,
            budget,
            swaps,
            self.pool,
            self.floor,
            self.caps(),
            reference=not self.two_pools,
        )
