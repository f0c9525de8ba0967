"""The short form of an allocator, for a method of your own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank.allocation.context import Axes
from adaptrank.allocation.events import Apply, Event, Proposal
from adaptrank.allocation.participant import Choice
from adaptrank.allocation.plans import Plan, Scores
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.state import TrackedTensors, Where
from adaptrank.axes import CostModel, RankAxis


class Allocator(Policy[TrackedTensors], registered=False):
    """An allocator whose state is reached through `track`, so that a method takes a few lines.

    A subclass overrides `score`, and often `observe`:

        class Movement(Allocator):
            def observe(self, axes):
                for axis in axes.values():
                    gradient = axis.gate_grad()
                    self.track(axis, "movement", torch.zeros_like(gradient)).sub_(gradient)

            def score(self, axis):
                return self.track(axis, "movement", torch.zeros(len(axis)))

    Everything else has a default. It translates these methods to the contract of `Policy`, which
    passes the state explicitly. Arguments are those of `Policy`.

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
    """

    short_form = True

    # ---- what a subclass writes

    def observe(self, axes: Axes) -> None:
        """Update running averages; gradients are complete, unscaled and not clipped yet."""
        super().update(self.engine.state, axes)

    def score(self, axis: RankAxis) -> Tensor:
        """Return the importance of each unit, (units,); higher is kept."""
        return super().score_units(self.engine.state, {axis.key: axis})[axis.key]

    def scores(self, axes: Axes) -> Scores:
        """Return the importance of the units of all axes, where one axis alone cannot tell."""
        if self.named_importance() is not None:
            return super().score_units(self.engine.state, axes)
        return {key: self.score(axis) for key, axis in axes.items()}

    def initial_ranks(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, int] | None:
        """Return the ranks to start from, {axis key: units}; None takes the model as it is."""
        return None

    def grounds(self) -> Event:
        """Return further entries of the event at step 0, after `initial_ranks`."""
        return {}

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Set a start for a new run, or refuse sizes from which it could not act."""

    def attach(self, axes: Axes) -> None:
        """Set gates and register hooks in `handles` when training starts or resumes."""

    def before_forward(self, axes: Axes) -> None:
        """Prepare the forward passes of the next optimizer step."""

    def after_step(self, axes: Axes) -> None:
        """Act after each optimizer step, before the event if there is one."""

    def carried_out(self, plan: Plan, step: int) -> None:
        """Act after a plan was carried out, on every process."""

    def remark(self) -> str:
        """Return what to add to the reason of the event that was planned last."""
        return ""

    # ---- what a subclass may use

    def track(self, axis: RankAxis, name: str, tensor: Tensor, where: Where = 0) -> Tensor:
        """Return a tensor that follows every rank change and goes into the checkpoint.

        In a run with several processes the tensor must be equal on all of them. Values computed
        from gradients are. Pass all other values through `reduce` first.

        Args:
            axis: the axis that owns the tensor.
            name: any name, unique within the axis.
            tensor: first value.
            where: the dimension that counts the units of the axis, in which fresh units are zero;
                None if there is none; or (axis key, dimension) pairs for several axes.
        """
        return self.engine.state.track(axis, name, tensor, where)

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch as training computes it, in evaluation mode."""
        return self.run.loss(batch)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes."""
        return self.run.reduce(tensor)

    def sizes(self) -> dict[str, int]:
        """Return the units of each axis, closed units included."""
        return self.run.sizes()

    def open_sizes(self) -> dict[str, int]:
        """Return the units of each axis that are not closed."""
        return self.run.open_sizes()

    def cost(self) -> CostModel:
        """Return what sizes cost, in the unit of the budget."""
        return self.run.cost()

    @property
    def examples(self) -> Sequence[Any]:
        """The first `examples_needed()` training batches, the same all through the run."""
        return self.run.examples

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far."""
        return self.run.steps_done

    @property
    def model(self) -> nn.Module:
        """Model that holds the wrappers."""
        return self.run.model

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers of the run."""
        return self.run.optimizers

    @property
    def batches(self) -> Iterable[Any]:
        """Training data of this run from the beginning, read lazily."""
        return self.run.batches

    @property
    def handles(self) -> list[RemovableHandle]:
        """Hooks that are removed when training is over."""
        return self.run.handles

    # ---- the contract, in terms of the methods above

    def update(self, state: TrackedTensors, axes: Axes) -> None:
        """Call `observe`."""
        self.observe(axes)

    def score_units(self, state: TrackedTensors, axes: Axes) -> Scores:
        """Call `scores`."""
        return self.scores(axes)

    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice | None:
        """Call `initial_ranks` and `grounds`."""
        ranks = self.initial_ranks(self.model, batches)
        return None if ranks is None else Choice(ranks, facts=self.grounds())

    def check_start(self, sizes: Mapping[str, int]) -> None:
        """Call `begin`."""
        self.begin(sizes)

    def install(self, state: TrackedTensors, axes: Axes) -> None:
        """Call `attach`."""
        self.attach(axes)

    def before_pass(self, state: TrackedTensors, axes: Axes) -> None:
        """Call `before_forward`."""
        self.before_forward(axes)

    def finish_step(self, state: TrackedTensors, axes: Axes) -> None:
        """Call `after_step`."""
        self.after_step(axes)

    def propose(
        self, state: TrackedTensors, scores: Scores, cost: CostModel, budget: int, step: int
    ) -> Proposal:
        """Call `plan` and `remark`."""
        return Proposal(self.plan(scores, cost, budget, step), self.remark())

    def carry_out(
        self,
        state: TrackedTensors,
        plan: Plan,
        step: int,
        apply: Apply,
    ) -> Event:
        """Carry the plan out, and call `carried_out`."""
        done = apply(plan, step)
        self.carried_out(plan, step)
        return done

    @property
    def chooses_ranks(self) -> bool:
        """Whether `initial_ranks` is overridden."""
        return type(self).initial_ranks is not Allocator.initial_ranks

    @classmethod
    def scores_by_name(cls) -> bool:
        """Return whether a named importance scores the units, and not the class itself."""
        by_default = cls.score is Allocator.score and cls.scores is Allocator.scores
        return cls.moves and by_default
