"""AdaLoRA: start with too many units, and close the least important as the budget falls."""

from typing import Literal

from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.plans import Close, Plan, Resize, Scores, keep_best
from adaptrank.allocation.schedules import cubic
from adaptrank.axes import CostModel


class AdaLoRA(Allocator):
    """Prune to a budget on a cubic curve: b(t) = floor(b_T + (b_0 - b_T) (1 - p)^3), p from 0 to 1.

    Soft, as in the paper: an event sets the closing factor of the least important units to zero, but they keep their
    slices and their gradients, grow again, and may be chosen at the next event. The last event removes what is closed
    physically, so that memory and time fall. `soft=False` removes at every event, and nothing comes back.

    Scores are running sensitivity times uncertainty of every element, I <- b I + (1 - b) |w g|,
    U <- b U + (1 - b) ||w g| - I|, no bias correction; a unit's is that of its gate plus the mean over each factor's slice.
    The product rewards noisy units and vanishes where training is deterministic; `importance="sensitivity"` does not.

    Source: arXiv:2303.10512; rules from the authors' code. Its README: 12 -> 8 ranks, warm-up 500, final 1500 and an
    event every 10 of 3000 steps, betas 0.85, an orthogonality weight of 0.1 (`SVD(orth=0.1)`).
    Args:
        budget: final total in `unit`; None is the total at the start divided by 1.5, as in the paper.
        soft: close until the last event, rather than remove at each.
        importance: score of a unit, any of `scores.IMPORTANCES`.
        beta: of the running averages.
        unit, every, warmup, final, floor, seed: as in `Allocator`.
    """

    source = "arXiv:2303.10512"

    def __init__(
        self,
        budget: int | None = None,
        soft: bool = True,
        importance: str = "sensitivity_uncertainty",
        beta: float = 0.85,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 10,
        warmup: int | float = 0.1,
        final: int | float = 0.3,
        floor: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, None, seed)
        self.soft = soft
        self.importance, self.beta = importance, beta

    def budget_at(self, step: int) -> int:
        target = int(self._start_total / 1.5) if self.budget is None else self.budget
        return cubic(self._start_total, target, self.phases.progress(step))

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        plan = keep_best(scores, cost, budget, self.floor)
        if not self.soft or step >= self.phases.end:
            return plan
        soft: Plan = {}
        for axis, change in plan.items():
            assert isinstance(change, Resize)
            soft[axis] = Close(tuple(sorted(set(range(len(scores[axis]))) - set(change.keep))))
        return soft
