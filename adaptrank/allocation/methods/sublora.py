"""SubLoRA: discard the units that the Hessian of the loss predicts to hurt least, greedily."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from adaptrank._errors import UserError
from adaptrank.allocation.context import Axes
from adaptrank.allocation.events import Event, Proposal
from adaptrank.allocation.plans import Plan, Scores
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.renamed import renamed_rule
from adaptrank.allocation.schedules import cubic
from adaptrank.allocation.scores import curvature, submodular
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import CostModel

Rule = Literal["fisher", "published", "block"]

ESTIMATORS: Mapping[Rule, curvature.Estimator] = {
    "fisher": "fisher",
    "published": "exact",
    "block": "block",
}
"""Rule -> estimator of the Hessian."""
VARIANTS: Mapping[Rule, str] = {
    "fisher": "Fisher",
    "published": "",
    "block": "Fisher within each axis",
}
"""Rule -> its name in tables and reports."""


class SecondOrderState(TrackedTensors):
    """The quadratic model of the loss that the plan of the present event is made from.

    It is estimated anew at each event, and is in no checkpoint.
    """

    quadratic: curvature.SecondOrder | None = None


class SubLoRA(Policy[SecondOrderState]):
    """Keep greedily the units whose removal is predicted to raise the loss most.

    Discarding a set of units u changes the loss by Q(u) = -sum g_i u_i + 1/2 sum M_ij u_i u_j, with
    g and M the gradient and the Hessian of the loss in a gate on each unit, at 1. Off the diagonal
    M is projected to max(M_ij, 0), the nearest matrix that makes the choice submodular. The greedy
    choice keeps the unit of highest gain, one at a time. Where every unit alone would hurt it is
    within 1 - 1/e of the best. Elsewhere it is a heuristic, and the event says so. Near a
    stationary point first-order scores lose their meaning, and this score does not.

    M is the Hessian itself with `rule="published"`: n products with it, by a second backward pass,
    which fused attention does not have. The default, `rule="fisher"`, takes the mean of
    gamma gamma^T over single examples, with gamma the gradient of one of them. It needs no second
    backward pass, and decides otherwise. On six planted layers the Hessian misses the ranks by 0 in
    the median of five seeds, and the Fisher matrix by 6 (SVD form, see docs/results). Tables and
    reports call the default "SubLoRA (Fisher)".

    The budget falls on AdaLoRA's cubic curve, so that M is estimated anew in each round. It is
    stale once many units are removed.

    Evidence in the paper is on neural PDE solvers only; there is none on language models. Source:
    arXiv:2507.01841 (abstract and summaries; the algebra here was derived from them, and its match
    with the paper's equations is not verified).

    Args:
        budget: final total in `unit`; None is half of the start.
        rule: what M is. "fisher" from single examples, "published", the Hessian, or "block", the
            Fisher matrix within each axis and zero elsewhere.
        batches: training batches that g and M are estimated on.
        allow_under_budget: keep no unit that is predicted to hurt by staying, but at least one of
            all.
        floor: smallest number of units of an axis; 0, since the objective of the paper counts
            discarded units and no layers.
        unit, every, warmup, final, seed: as in `Policy`.
        estimator: earlier name of `rule`, where "exact" is "published".
    Raises:
        ValueError: for an unknown rule or no batches; at the start, for a Hessian that is too
            large.
    """

    source = "arXiv:2507.01841"

    def __init__(
        self,
        budget: int | None = None,
        rule: Rule = "fisher",
        batches: int = 4,
        allow_under_budget: bool = False,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 50,
        warmup: int | float = 0.3,
        final: int | float = 0.3,
        floor: int = 0,
        seed: int = 0,
        estimator: Literal["fisher", "exact", "block"] | None = None,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, None, seed)
        if estimator is not None:
            meant = _rule_of(estimator)
            rule = renamed_rule("SubLoRA", f"estimator={estimator!r}", meant, rule, "fisher")
        if rule not in ESTIMATORS or batches < 1:
            raise UserError(
                f"rule={rule!r}, batches={batches}; use 'fisher', 'published' or 'block' on at "
                f"least one batch."
            )
        self.rule, self.count = rule, batches
        self.allow_under_budget = allow_under_budget
        self.exact = not allow_under_budget

    @property
    def variant(self) -> str:
        return VARIANTS[self.rule]

    @classmethod
    def present_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        present = dict(arguments)
        estimator = present.pop("estimator", None)
        if estimator is not None:
            present["rule"] = _rule_of(estimator)
        return present

    def init_state(self, axes: Axes) -> SecondOrderState:
        return SecondOrderState()

    def score_units(self, state: SecondOrderState, axes: Axes) -> Scores:
        state.quadratic = curvature.estimate(axes, self._context(state), ESTIMATORS[self.rule])
        return curvature.by_axis(state.quadratic, curvature.alone(state.quadratic))

    def budget_at(self, step: int) -> int:
        start = self.run.start_total
        target = max(start // 2, 1) if self.budget is None else self.budget
        return cubic(start, target, self.run.phases.progress(step))

    @property
    def only_prunes(self) -> bool:
        return not self.allow_under_budget

    def propose(
        self, state: SecondOrderState, scores: Scores, cost: CostModel, budget: int, step: int
    ) -> Proposal:
        assert state.quadratic is not None
        kept, monotone = submodular.greedy(
            state.quadratic, cost, budget, self.floors(), self.allow_under_budget
        )
        plan = submodular.as_plan(state.quadratic, kept)
        if monotone:
            return Proposal(plan)
        remark = "some units alone would help by going, so the greedy choice is a heuristic here"
        return Proposal(plan, remark)

    def carry_out(
        self,
        state: SecondOrderState,
        plan: Plan,
        step: int,
        apply: Callable[[Plan, int], Event],
    ) -> Event:
        done = apply(plan, step)
        state.quadratic = None  # it speaks of units that are gone
        return done

    def examples_needed(self) -> int:
        return self.count

    def refuses(self, axes: Axes) -> str:
        return "" if self.rule == "block" else curvature.too_many(axes)


def _rule_of(estimator: str) -> Any:
    return "published" if estimator == "exact" else estimator
