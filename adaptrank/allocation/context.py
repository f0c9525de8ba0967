"""The context of a policy: the model, the data and the progress of the run it takes part in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank._collectives import mean
from adaptrank._errors import UserError
from adaptrank.allocation.events import Event
from adaptrank.allocation.schedules import Phases
from adaptrank.allocation.state import Progress, TrackedTensors, Where
from adaptrank.axes import CostModel, RankAxis, cost_model, holds, rank_axes, rank_cost
from adaptrank.parameterizations import Parameterization, wrappers
from adaptrank.training.evaluation import evaluating

Axes = Mapping[str, RankAxis]
"""Axis key -> rank axis, in natural order."""
Loss = Callable[[Any], Tensor]
"""Batch -> mean loss."""


@dataclass
class Run:
    """The model, data and progress of a run, as a policy may use them.

    Args:
        owner: name of the allocator, for errors.
        model: holds the wrappers.
        axes: what the allocator allocates.
        left_out: axes that it leaves as they are, because nothing trains them in this run.
        optimizers: optimizers of the run.
        progress: steps, sizes and events; it goes into the checkpoint.
        unit: "ranks" or "parameters".
        examples_needed: number of training batches in `examples`.
        batches: training data of this run from the beginning, read lazily; not the batches that
            training takes.
        loss_function: batch -> mean loss, or None if the run was started without one.
        handles: hooks to remove when training is over.
    """

    owner: str
    model: nn.Module
    axes: Axes
    optimizers: list[torch.optim.Optimizer]
    progress: Progress
    unit: str = "ranks"
    examples_needed: int = 0
    batches: Iterable[Any] = ()
    loss_function: Loss | None = None
    left_out: Axes = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def phases(self) -> Phases:
        """Phases of the run, in optimizer steps.

        Raises:
            RuntimeError: if the run has not started.
        """
        if self.progress.phases is None:
            raise RuntimeError(f"{self.owner} learns its steps from the trainer when it starts.")
        return self.progress.phases

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the run so far."""
        return self.progress.steps_done

    @property
    def start_sizes(self) -> dict[str, int]:
        """Units of each axis when the run began."""
        return self.progress.start_sizes

    @property
    def start_total(self) -> int:
        """Cost of the units at the start, in the unit of the budget."""
        return self.progress.start_total

    @property
    def moves_left(self) -> bool:
        """Whether an event may still come: the last one is ahead, or was put off."""
        return self.steps_done < self.phases.end or self.progress.deferred

    def trained_tensors(self) -> list[Tensor]:
        """Return the tensors of all axes."""
        return [tensor for axis in self.axes.values() for tensor in axis.tensors()]

    def owners(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers that move a tensor of an axis."""
        tensors = self.trained_tensors()
        return [optimizer for optimizer in self.optimizers if holds(optimizer, tensors)]

    def learning_rates(self, axes: Axes) -> dict[str, float]:
        """Return the present learning rate of each axis, {axis key: learning rate}.

        It is that of the parameter group that holds the closing factor of the axis. So where
        LoRA+ trains A and B in two groups, the group of B counts. If no optimizer moves the closing
        factor, another tensor of the axis counts. The rate is 0 if no optimizer moves any of them.
        """
        rate_of: dict[int, float] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                rate = float(group["lr"])
                for parameter in group["params"]:
                    rate_of.setdefault(id(parameter), rate)
        rates = {}
        for key, axis in axes.items():
            tensors = [slot.tensor for slot in [*axis.closing(), *axis.slots()]]
            moved = (rate_of[id(tensor)] for tensor in tensors if id(tensor) in rate_of)
            rates[key] = next(moved, 0.0)
        return rates

    @property
    def examples(self) -> Sequence[Any]:
        """The first training batches, the same all through the run and in its checkpoint.

        Raises:
            ValueError: if there are fewer batches than needed.
        """
        if self.progress.examples is None:
            self.progress.examples = self._read_examples()
        return self.progress.examples

    def _read_examples(self) -> list[Any]:
        examples: list[Any] = []
        for batch in self.batches:
            if len(examples) == self.examples_needed:
                break
            examples.append(batch)
        if len(examples) < self.examples_needed:
            raise UserError(
                f"{self.owner} evaluates the loss on {self.examples_needed} training batch(es), "
                f"and got {len(examples)}; give `start` batches, or take a score that needs none."
            )
        return examples

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch as training computes it, in evaluation mode.

        Nothing is logged, and the state of the random number generators stays as it is. The loss
        is the mean over the examples of this process; `reduce` averages over all processes.

        Raises:
            ValueError: if the run was started without a loss.
        """
        if self.loss_function is None:
            raise UserError(
                f"{self.owner} evaluates the loss of whole batches; give `start` a function, "
                f"loss=lambda batch: ..."
            )
        with evaluating(self.model):
            return self.loss_function(batch)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes."""
        return mean(tensor)

    def sizes(self) -> dict[str, int]:
        """Return the units of each axis, closed units included."""
        return {key: len(axis) for key, axis in self.axes.items()}

    def open_sizes(self) -> dict[str, int]:
        """Return the units of each axis that are not closed."""
        closed = self.progress.closed
        return {key: len(axis) - len(closed.get(key, ())) for key, axis in self.axes.items()}

    def open_parameters(self) -> int:
        """Return the parameters of the adapters, without those of closed units."""
        sizes = {**_all_sizes(self.model), **self.open_sizes()}
        return cost_model(self.model).total(sizes)

    def cost(self) -> CostModel:
        """Return what sizes cost, in the unit of the budget.

        Adapters that are left out, or off, cost nothing.
        """
        if self.unit == "ranks":
            return rank_cost(self.axes)
        cost = cost_model(self.model, self._wrappers_left_out())
        if not self.left_out:
            return cost
        sizes = {key: len(axis) for key, axis in self.left_out.items()}
        return cost.in_steps(dict.fromkeys(self.axes, 1), sizes)

    def _wrappers_left_out(self) -> list[Parameterization]:
        """Return the wrappers without an axis of the run that are off, or have axes left out."""
        taking_part = {id(layer) for axis in self.axes.values() for layer, _ in axis.members}
        unmoved = {id(layer) for axis in self.left_out.values() for layer, _ in axis.members}
        return [
            wrapper
            for wrapper in wrappers(self.model)
            if id(wrapper) not in taking_part and (id(wrapper) in unmoved or not wrapper.enabled)
        ]

    def note_start(self) -> None:
        """Note the present sizes, and their cost, as those that the run begins with."""
        self.progress.start_sizes = self.sizes()
        self.progress.start_total = self.cost().total(self.start_sizes)

    def record(self, event: Event) -> Event:
        """Add the totals to an event, append it to the events of the run, and return it."""
        open_sizes = self.open_sizes()
        event["total"] = self.cost().total(open_sizes)
        event["active"] = sum(open_sizes.values())
        event["allocated"] = sum(self.sizes().values())
        event["parameters"] = self.open_parameters()
        event["allocated_parameters"] = cost_model(self.model).total(_all_sizes(self.model))
        self.progress.events.append(event)
        return event

    def ceilings(self, cap: int | None = None) -> dict[str, int | None]:
        """Return the largest size of each axis: `cap` or the ceiling of the method."""
        ceilings: dict[str, int | None] = {}
        for key, axis in self.axes.items():
            bounds = [bound for bound in (cap, axis.limits()[1]) if bound is not None]
            ceilings[key] = min(bounds, default=None)
        return ceilings


@dataclass
class ScoreContext:
    """The view of a run that a named importance gets: data, and the tensors that it tracks.

    Args:
        run: the run that is scored.
        state: holds running averages.
        beta: decay of running averages.
        seed: seed of random scores.
    """

    run: Run
    state: TrackedTensors
    beta: float
    seed: int
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.run.model

    @property
    def examples(self) -> Sequence[Any]:
        """Training batches that the score is computed on."""
        return self.run.examples

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far."""
        return self.run.steps_done

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch in evaluation mode."""
        return self.run.loss(batch)

    def track(self, axis: RankAxis, name: str, tensor: Tensor, where: Where = 0) -> Tensor:
        """Return a running tensor of an axis."""
        return self.state.track(axis, name, tensor, where)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes."""
        return self.run.reduce(tensor)


def _all_sizes(model: nn.Module) -> dict[str, int]:
    """Return the units of every axis of a model, of those as well that do not train."""
    return {key: len(axis) for key, axis in rank_axes(model).items()}
