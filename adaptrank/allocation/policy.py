"""The contract of an allocator: a small policy that says what is important and what to keep.

The shipped methods derive from `Policy`. Each file has the same members in the same order:
arguments, `init_state`, `update`, `score_units`, `budget_at`, `plan`. For a method of your own
`Allocator` is shorter.
"""

from typing import Generic, Literal, TypeVar, cast

from adaptrank.allocation.context import Axes, ScoreContext
from adaptrank.allocation.events import Apply, Event, Proposal
from adaptrank.allocation.participant import Participant
from adaptrank.allocation.plans import Plan, Scores, keep_best
from adaptrank.allocation.schedules import cubic
from adaptrank.allocation.scores.importance import Importance, importance
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import CostModel

State = TypeVar("State", bound=TrackedTensors)


class Policy(Participant, Generic[State], registered=False):
    """Decides how many units each rank axis keeps, and when that changes.

    By default every event keeps the units with the largest importance per cost, within a budget
    that falls on AdaLoRA's cubic curve from the total at the start to `budget`. Events fall on
    optimizer steps, after the step. Every event is in `events`, in the log, and in the checkpoint.

    A policy keeps everything it remembers in its state, and never in an attribute.

    Args:
        budget: final total, in `unit`; None is the total at the start.
        unit: "ranks" counts units; "parameters" counts all trainable parameters of the adapters.
        every: optimizer steps from one event to the next.
        warmup: steps before the first event; an integer is steps, a float from 0.0 to 1.0 is a
            fraction of all steps.
        final: steps at the end in which nothing moves, in the same form.
        floor: smallest number of units of an axis; 0 lets an axis lose all of them. Axes that
            multiply each other, such as the bonds of a tensor train, keep at least one.
        cap: largest number of units of an axis; None is the ceiling of the method.
        seed: seed of the generator that initializes new units.
    Raises:
        ValueError: for arguments out of range. At the start of a run: for a schedule that would
            never act, a budget that cannot be met, or a model with nothing to allocate.
    """

    importance: str = "gate"
    """Name of the score of a unit; see `scores.IMPORTANCES`."""
    beta: float = 0.85
    """Decay of running averages."""

    def __init__(
        self,
        budget: int | None = None,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 10,
        warmup: int | float = 0.1,
        final: int | float = 0.3,
        floor: int = 1,
        cap: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, cap, seed)

    def init_state(self, axes: Axes) -> State:
        """Return an empty state: tensors that follow every rank change."""
        return cast(State, TrackedTensors())

    def update(self, state: State, axes: Axes) -> None:
        """Update the state; gradients are complete, unscaled and not clipped yet."""
        score = importance(self.importance)
        if self.moves and score.observe is not None:
            score.observe(axes, self._context(state))

    def score_units(self, state: State, axes: Axes) -> Scores:
        """Return the importance of the units, {axis key: (units,)}; higher is kept."""
        return importance(self.importance).score(axes, self._context(state))

    def budget_at(self, step: int) -> int | None:
        """Return the budget enforced at `step`, or None if the plan is unconstrained."""
        target = self.run.start_total if self.budget is None else self.budget
        return cubic(self.run.start_total, target, self.run.phases.progress(step))

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        """Return what to keep, close and grow. A plan is a pure function of its arguments."""
        return keep_best(scores, cost, budget, self.floors())

    # ---- optional members

    def propose(
        self, state: State, scores: Scores, cost: CostModel, budget: int, step: int
    ) -> Proposal:
        """Return the plan, with a remark for the record of the event."""
        return Proposal(self.plan(scores, cost, budget, step))

    def carry_out(self, state: State, plan: Plan, step: int, apply: Apply) -> Event:
        """Carry a plan out, and return what was done. It runs on every process.

        Args:
            state: state of the policy; it follows the plan.
            plan: what to keep, close and grow.
            step: optimizer step of the event.
            apply: carries the plan out on tensors, optimizers and state.
        """
        return apply(plan, step)

    def examples_needed(self) -> int:
        """Return the number of training batches that the scores are computed on."""
        score = self.named_importance()
        return 0 if score is None else score.examples

    def refuses(self, axes: Axes) -> str:
        """Return why the importance cannot score these axes; "" if it can."""
        score = self.named_importance()
        return "" if score is None else score.refuses(axes)

    def named_importance(self) -> Importance | None:
        """Return the importance that scores the units, or None if the class scores them itself."""
        return importance(self.importance) if self.scores_by_name() else None

    @classmethod
    def scores_by_name(cls) -> bool:
        """Return whether a named importance scores the units, and not the class itself."""
        return cls.moves and cls.score_units is Policy.score_units

    @property
    def only_prunes(self) -> bool:
        """Whether it moves nothing unless the budget is below the start."""
        return type(self).plan is Policy.plan

    def _context(self, state: State) -> ScoreContext:
        return ScoreContext(self.run, state, self.beta, self.seed)
