"""SubLoRA: discard the units that the Hessian of the loss predicts to hurt least, chosen greedily."""

from typing import Literal

from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.plans import Plan, Scores
from adaptrank.allocation.schedules import cubic
from adaptrank.allocation.scores import curvature as second_order
from adaptrank.allocation.scores import submodular
from adaptrank.allocation.scores.importance import Axes
from adaptrank.axes import CostModel


class SubLoRA(Allocator):
    """Predict what discarding a set of units does to the loss, Q(u) = -sum g_i u_i + 1/2 sum M_ij u_i u_j, and keep greedily what hurts.

    g and M are the gradient and the Hessian of the loss in a gate on each unit, at 1. Off the diagonal M is projected to max(M_ij, 0), the
    nearest matrix that makes the choice submodular; one unit at a time the greedy choice keeps the one of highest gain. Where every
    unit alone would hurt, it is within 1 - 1/e of the best; elsewhere it is a heuristic, and the event says so. Near a stationary point
    first-order scores lose their meaning, and this does not.

    The budget falls on AdaLoRA's cubic curve, so that M, which is stale once many units are gone, is estimated anew in each round.

    Evidence in the paper is on neural PDE solvers only; there is none on language models. Source: arXiv:2507.01841 (abstract and summaries;
        the algebra here was derived from them, and its match with the paper's equations is not verified).
    Args:
        budget: final total in `unit`; None is half of the start.
        estimator: "fisher" from single examples, "exact", or "block", Fisher within each axis alone.
        batches: training batches that g and M are estimated on.
        allow_under_budget: keep no unit that is predicted to hurt by staying.
        unit, every, warmup, final, floor, seed: as in `Allocator`.
    Raises:
        ValueError: for an unknown estimator or no batches; at the start, for a Hessian that is too large.
    """

    source = "arXiv:2507.01841"

    def __init__(
        self,
        budget: int | None = None,
        estimator: Literal["fisher", "exact", "block"] = "fisher",
        batches: int = 4,
        allow_under_budget: bool = False,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 50,
        warmup: int | float = 0.3,
        final: int | float = 0.3,
        floor: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, None, seed)
        if estimator not in ("fisher", "exact", "block") or batches < 1:
            raise UserError(
                f"estimator={estimator!r}, batches={batches}; use 'fisher', 'exact' or 'block' on at least one batch."
            )
        self.estimator, self.count, self.allow_under_budget = estimator, batches, allow_under_budget
        self.exact = not allow_under_budget
        self._second: second_order.SecondOrder | None = None
        self._monotone = True

    def _check_axes(self) -> None:
        super()._check_axes()
        if self.estimator != "block" and (refused := second_order.too_many(self._axes)):
            raise UserError(f"SubLoRA: {refused}.")

    def examples_needed(self) -> int:
        return self.count

    def budget_at(self, step: int) -> int:
        target = max(self._start_total // 2, 1) if self.budget is None else self.budget
        return cubic(self._start_total, target, self.phases.progress(step))

    def scores(self, axes: Axes) -> Scores:
        self._second = second_order.estimate(axes, self, self.estimator)
        return second_order.by_axis(self._second, second_order.alone(self._second))

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        assert self._second is not None
        kept, self._monotone = submodular.greedy(
            self._second, cost, budget, self.floor, self.allow_under_budget
        )
        return submodular.as_plan(self._second, kept)

    def carried_out(self, plan: Plan, step: int) -> None:
        self._second = None

    def remark(self) -> str:
        return (
            ""
            if self._monotone
            else "some units alone would help by going, so the greedy choice is a heuristic here"
        )
