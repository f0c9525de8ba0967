"""The callback that joins a score, a schedule and a plan; the only impure file of this folder."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank._collectives import first, from_first, mean
from adaptrank._errors import UserError
from adaptrank.allocation.plans import Close, Plan, Resize, Scores, keep_best
from adaptrank.allocation.schedules import Phases, cubic, steps
from adaptrank.allocation.scores.importance import Axes, Where, importance
from adaptrank.axes import (
    CostModel,
    RankAxis,
    check_optimizer,
    cost_model,
    fit_ranks,
    generator,
    rank_axes,
    rank_cost,
)
from adaptrank.parameterizations import (
    PARAMETERIZATIONS,
    Parameterization,
    adapted_part,
    on_example,
    wrapped_layers,
    wrappers,
)
from adaptrank.registry import Registry
from adaptrank.training.distributed import average_adapters, keep_apart, rejoin
from adaptrank.training.penalties import add_penalty_gradients, penalty_gradients

ALLOCATORS: Registry["Allocator"] = Registry("allocator")
"""Class name -> class."""

Loss = Callable[[Any], Tensor]


class Event(TypedDict, total=False):
    """What happened at a step; a line of `ranks.jsonl`."""

    step: int
    reason: str
    budget: int | None
    unit: str
    total: int  # of what is open, in the unit of the budget
    active: int  # open units
    allocated: int  # units that take memory
    sizes: dict[str, int]  # of the axes that changed, after the event
    pruned: dict[str, list[int]]
    grown: dict[str, int]
    closed: dict[str, list[int]]
    scores: dict[str, float]  # min, quartiles, max of all units
    skipped: str
    dimensions: list[
        float
    ]  # intrinsic ones, of what the blocks read and of what the last one gives


@dataclass
class Tracked:
    """A running tensor, and (axis key, dimension) for each axis that it follows."""

    tensor: Tensor
    dims: tuple[tuple[str, int], ...]


class Allocator(Callback):
    """Decides how many units each rank axis keeps, and when that changes.

    A subclass overrides `score`, seldom more: by default every event keeps the units with most importance per cost,
    within a budget that falls from the total at the start to `budget` on AdaLoRA's cubic curve. It works on any
    LightningModule that holds wrappers. Events fall on optimizer steps, after the step; the number of steps comes from the
    trainer. Every event is in `events`, in the log, and in the checkpoint.

    Outside of Lightning three calls do the same: `start` before the first step, `before_step` once the gradients of a step are
    complete, `step` after the optimizer's.

    Args:
        budget: final total, in `unit`; None is the total at the start.
        unit: "ranks" counts units, "parameters" all trainable adapter parameters, those on no axis included.
        every: optimizer steps from one event to the next.
        warmup: steps before the first event can be; an integer is steps, a float from 0.0 to 1.0 a fraction of all.
        final: steps at the end in which nothing moves, in the same form.
        floor: least number of units of an axis.
        cap: largest number of units of an axis; None for the method's own ceiling.
        seed: of what fresh units draw.
    Raises:
        ValueError: for arguments out of range; at the start of a run, for a schedule that would never act, a budget that
            cannot be met, or a model with nothing to allocate.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """Capabilities an axis must have beside pruning: "grow", ..."""
    options: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Argument -> further capabilities that it asks for while it is not off (False, 0, None)."""
    exclusive: ClassVar[bool] = False
    """Whether it tolerates no second allocator, not even one that only chooses the ranks to start from."""
    moves: ClassVar[bool] = True
    """Whether it has events; one that only chooses the ranks to start from has none, and may stand beside one that has."""
    exact: bool = True
    """Whether a budget in ranks is met exactly, rather than never exceeded."""
    source: ClassVar[str] = ""
    """arXiv id of the method."""
    importance: str = "gate"
    """Name of the score that the default `observe` and `score` use."""
    beta: float = 0.85
    """Of its running averages."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ALLOCATORS.add(cls)

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
        if unit not in ("ranks", "parameters"):
            raise UserError(f"unit={unit!r}; a budget counts 'ranks' or 'parameters'.")
        if (
            every < 1
            or floor < 1
            or (cap is not None and cap < floor)
            or (budget is not None and budget < 1)
        ):
            raise UserError(
                f"every={every}, floor={floor}, cap={cap}, budget={budget}: all are at least 1, and cap at least floor."
            )
        steps(warmup, 0), steps(final, 0)
        self.budget, self.unit, self.every = budget, unit, every
        self.warmup, self.final = warmup, final
        self.floor, self.cap, self.seed = floor, cap, seed
        self.model: nn.Module = nn.Module()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.handles: list[RemovableHandle] = []
        """Hooks that `attach` registered; the shell removes them when training is over."""
        self.batches: Iterable[Any] = ()
        """The training data of this run, from their beginning; read lazily, and not the batches that training takes."""
        self._loss: Loss | None = None
        self._axes: Axes = {}
        self._running = False
        self._restored = False
        self._stored_budget: list[int | str | None] = [
            budget,
            unit,
        ]  # of the checkpoint, once one is loaded
        self._forget()

    def _forget(self) -> None:
        """The state of a run that has not begun."""
        self.events: list[Event] = []
        self.closed: dict[
            str, tuple[int, ...]
        ] = {}  # units that a plan closed, until the next event
        self._tracked: dict[str, dict[str, Tracked]] = {}
        self._start: dict[str, int] = {}  # size of each axis when the run began
        self._start_total = 0
        self._phases: Phases | None = None
        self._steps_done = 0
        self._bad_steps = 0
        self._owed = False  # the last event was put off
        self._examples: list[Any] | None = None

    # ---- what a method writes

    def find_axes(self, model: nn.Module) -> Axes:
        """What it allocates: the rank axes of the model, unless it prunes something else."""
        return rank_axes(model)

    def initial_ranks(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, int] | None:
        """Sizes to begin the run with, {axis: units}, or None to take the model as it is."""
        return None

    def grounds(self) -> Event:
        """What `initial_ranks` went by, for the record of the event at step 0."""
        return {}

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Called once, with the sizes that a new run starts from; the place to set a start, and to refuse what makes no sense."""

    def attach(self, axes: Axes) -> None:
        """Called whenever training starts, a resumed run's as well: hang gates, and register hooks into `handles`."""

    def before_forward(self, axes: Axes) -> None:
        """Called before the forward passes of each optimizer step."""

    def observe(self, axes: Axes) -> None:
        """Feed running averages; gradients are complete, unscaled and unclipped, the step is not made yet."""
        named = importance(self.importance)
        if self.moves and named.observe is not None:
            named.observe(axes, self)

    def scores(self, axes: Axes) -> Scores:
        """Importance of the units of all axes, {axis: (units,)}, where they are not told one axis at a time."""
        if type(self).score is not Allocator.score:
            return {key: self.score(axis) for key, axis in axes.items()}
        return importance(self.importance).score(axes, self)

    def score(self, axis: RankAxis) -> Tensor:
        """Importance of each unit, (units,); higher is kept."""
        return importance(self.importance).score({axis.key: axis}, self)[axis.key]

    def budget_at(self, step: int) -> int | None:
        """The total that binds after the event at `step`; None where the outcome is whatever the plan says."""
        target = self._start_total if self.budget is None else self.budget
        return cubic(self._start_total, target, self.phases.progress(step))

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        """What to keep, close and grow; pure."""
        return keep_best(scores, cost, budget, self.floor)

    def acts_at(self, step: int) -> bool:
        """Whether an event at this step could move anything; a run in which none could is refused at its start.

        Where it says no, scores that evaluate the loss are not asked for.
        """
        return True

    def carried_out(self, plan: Plan, step: int) -> None:
        """Called after a plan was carried out, on every process."""

    def remark(self) -> str:
        """What to add to the reason of the event that was planned last."""
        return ""

    def after_step(self, axes: Axes) -> None:
        """Called after each optimizer step, before the event if there is one."""

    def examples_needed(self) -> int:
        """Number of training batches that `examples` holds; by default as many as the importance evaluates the loss on."""
        return importance(self.importance).examples if self._scores_by_name() else 0

    # ---- what the library provides

    def track(self, axis: RankAxis, name: str, tensor: Tensor, where: Where = 0) -> Tensor:
        """The running tensor `name` of an axis: it follows every resize, and goes into the checkpoint.

        Of several processes the first one's is what the checkpoint holds, so what goes in must be the same on all: what is computed
        from gradients is, anything else goes through `reduce` first.

        Args:
            axis: owns it.
            name: any name.
            tensor: what it starts from, if there is none of that name.
            where: the dimension that counts the units of the axis, in which fresh units are zero; None if none does; or pairs of an
                axis key and a dimension, for a tensor that follows several.
        """
        tracked = self._tracked.setdefault(axis.key, {})
        if name not in tracked:
            dims = (
                ()
                if where is None
                else ((axis.key, where),)
                if isinstance(where, int)
                else tuple(where)
            )
            tracked[name] = Tracked(
                tensor.detach().clone(memory_format=torch.contiguous_format), dims
            )
        return tracked[name].tensor

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the run so far."""
        return self._steps_done

    @property
    def phases(self) -> Phases:
        """The phases of this run, in steps; known once it has started."""
        if self._phases is None:
            raise RuntimeError(
                f"{type(self).__name__} learns its steps from the trainer when the run starts."
            )
        return self._phases

    @property
    def examples(self) -> Sequence[Any]:
        """The first `examples_needed()` training batches, the same all through the run and in its checkpoint."""
        if self._examples is None:
            self._examples = []
            for batch in self.batches:
                if len(self._examples) == self.examples_needed():
                    break
                self._examples.append(batch)
            if len(self._examples) < self.examples_needed():
                raise UserError(
                    f"{type(self).__name__} evaluates the loss on {self.examples_needed()} training batch(es), and got "
                    f"{len(self._examples)}; give `start` batches, or take a score that needs none."
                )
        return self._examples

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch as training computes it, in evaluation mode, with nothing logged and no random number drawn.

        The mean over the examples of this process; `reduce` averages over all.

        Raises:
            ValueError: if the run was started without a loss.
        """
        if self._loss is None:
            raise UserError(
                f"{type(self).__name__} evaluates the loss of whole batches; give `start` a function, loss=lambda batch: ..."
            )
        with evaluating(self.model):
            return self._loss(batch)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The mean over all processes; what is computed from averaged gradients is the same on all and needs none."""
        return mean(tensor)

    def caps(self) -> dict[str, int | None]:
        """Largest size of each axis: `cap`, the method's ceiling, whichever is less."""
        caps: dict[str, int | None] = {}
        for key, axis in self._axes.items():
            bounds = [bound for bound in (self.cap, axis.limits()[1]) if bound is not None]
            caps[key] = min(bounds, default=None)
        return caps

    def sizes(self) -> dict[str, int]:
        """Units of each axis, closed ones included."""
        return {key: len(axis) for key, axis in self._axes.items()}

    def open_sizes(self) -> dict[str, int]:
        """Units of each axis that are not closed."""
        return {key: len(axis) - len(self.closed.get(key, ())) for key, axis in self._axes.items()}

    def cost(self) -> CostModel:
        """What sizes cost, in the unit of the budget."""
        return rank_cost(self._axes) if self.unit == "ranks" else cost_model(self.model)

    # ---- three calls

    def start(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        total_steps: float,
        *,
        batches: Iterable[Any] = (),
        loss: Loss | None = None,
    ) -> None:
        """Begin a run, or go on with one whose state was loaded.

        Args:
            model: holds the wrappers, on its device.
            optimizers: one, or several.
            total_steps: optimizer steps of the whole run.
            batches: training batches, for allocators that look at data; they are read when needed.
            loss: batch -> mean loss, for allocators that evaluate it.
        Raises:
            ValueError: if the run makes no sense; see the class.
        """
        self.optimizers = (
            [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        )
        self.model, self.batches, self._loss = adapted_part(model), batches, loss
        self._axes = {
            key: axis for key, axis in self.find_axes(self.model).items() if axis.trainable()
        }
        self._check_axes()
        for optimizer in self.optimizers:
            check_optimizer(optimizer)
        phases = self.phases_of(total_steps)
        resumed, self._restored = self._restored, False
        if resumed:
            self._check_resume(phases)
        else:
            self._forget()
        if self.moves:
            self.check_schedule(phases)
        self._phases = phases
        if not resumed:
            self._begin()
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for tracked in (one for of_axis in self._tracked.values() for one in of_axis.values()):
            tracked.tensor = tracked.tensor.to(device)
        if self.examples_needed():
            len(self.examples)  # drawn now, so that a checkpoint of any step has them
        self.attach(self._axes)
        with torch.no_grad():
            self.before_forward(self._axes)
        self._running = True

    def before_step(self, scale: float = 1.0) -> None:
        """Call it when the gradients of an optimizer step are complete: after the last backward pass, before clipping.

        It adds the gradients of the methods' own regularizers, and observes.

        Args:
            scale: what a gradient scaler multiplied the loss by, `scaler.get_scale()`; the gradients in the optimizer are unscaled
                already, those of gates are in no optimizer.
        """
        penalty_gradients(self.model)
        self._before_step(scale)

    def _before_step(self, scale: float = 1.0) -> None:
        if self._steps_done >= self.phases.end and self.moves and not self._owed:
            return
        grads = [
            s.tensor.grad
            for axis in self._axes.values()
            for s in axis.slots()
            if s.tensor.grad is not None
        ]
        own = [leaf.grad for leaf in self._leaves() if leaf.grad is not None]
        if own and scale != 1.0:
            torch._foreach_mul_(own, 1 / scale)
        grads += own
        if grads and not torch.isfinite(torch.stack(list(torch._foreach_norm(grads))).sum()):
            self._bad_steps += 1
            if self._bad_steps == 50:
                raise RuntimeError(
                    "Gradients were not finite for 50 optimizer steps in a row; lower the learning rate."
                )
            return
        self._bad_steps = 0
        with torch.no_grad():
            self.observe(self._axes)

    def step(self) -> Event | None:
        """Call it after the optimizer's step; returns the event, if there was one."""
        return self._step(self._steps_done + 1)

    def _leaves(self) -> list[Tensor]:
        """Tracked tensors that gradients reach: gates."""
        tracked = (one.tensor for of_axis in self._tracked.values() for one in of_axis.values())
        return [tensor for tensor in tracked if tensor.requires_grad]

    def finish(self) -> None:
        """Remove hooks; called when training is over."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._running = False

    def foresee(self, model: nn.Module, total_steps: float) -> list[tuple[int, int | None]]:
        """(step, budget) of every event of a run that has not begun, from the shapes of a model alone; it may be on the meta device.

        Raises:
            ValueError: for whatever a run would refuse at its start, as far as shapes tell.
        """
        self._forget()
        self.model = adapted_part(model)
        self._axes = {
            key: axis for key, axis in self.find_axes(self.model).items() if axis.trainable()
        }
        self._check_axes()
        phases = self.phases_of(total_steps)
        self.check_schedule(phases)
        self._phases, self._start = phases, self.sizes()
        self._start_total = self.cost().total(self._start)
        if not self.moves:
            return []
        self.begin(self._start)
        self.check_budget(self._start)
        return [(step, self.budget_at(step)) for step in phases.events()]

    # ---- the shell

    def phases_of(self, total: float) -> Phases:
        """The phases of a run of `total` optimizer steps.

        Raises:
            ValueError: if the run has no end.
        """
        if not math.isfinite(total):
            raise UserError(
                f"{type(self).__name__} needs to know where training ends; set max_steps or max_epochs."
            )
        return Phases(
            int(total), steps(self.warmup, int(total)), steps(self.final, int(total)), self.every
        )

    def check_schedule(self, phases: Phases) -> None:
        """Take these phases, if an event in them can move anything.

        Raises:
            ValueError: if it would never act.
        """
        self._phases = phases
        if not self.moves:
            return
        if phases.end <= phases.warmup:
            raise UserError(
                f"{type(self).__name__} would never act: its warm-up of {phases.warmup} and final {phases.final} steps leave "
                f"none of the {phases.total} steps of this run; shorten them, or raise max_steps."
            )
        if not any(self.acts_at(step) for step in phases.events()):
            raise UserError(
                f"{type(self).__name__} would never act: with an event every {phases.every} steps between {phases.warmup} and "
                f"{phases.end}, none moves a unit; lower `every`, or raise max_steps."
            )

    def unfit(self, axis: RankAxis) -> str:
        """Why it cannot work on an axis, as the middle of a sentence; empty where it can."""
        missing = self.requires - axis.capabilities
        if missing:
            return f"needs axes that can {_words(missing)}"
        for name, needs in self.options.items():
            if getattr(self, name) and needs - axis.capabilities:
                off = _off(getattr(self, name))
                lacks = _words(needs - axis.capabilities)
                return f"with {name}={getattr(self, name)!r} needs axes that can {lacks} (with {name}={off!r} it does not)"
        return ""

    def _check_axes(self) -> None:
        named = importance(self.importance)
        name, fits = type(self).__name__, self._fitting()
        suggestion = f"use one of {', '.join(fits)}" if fits else "no parameterization here can"
        if not self._axes:
            found = wrappers(self.model)
            methods = ", ".join(sorted({type(wrapper).__name__ for wrapper in found}))
            if any(wrapper.axes for wrapper in found):
                raise UserError(
                    f"{name} has nothing to allocate: no tensor of a rank axis of {methods} is trained."
                )
            what = f"{methods} has no rank axis" if methods else "the model has no adapter"
            beside = _beside(next(iter(wrapped_layers(self.model).values())), fits) if found else ""
            raise UserError(f"{name} has nothing to allocate: {what}; {suggestion}{beside}.")
        for key, axis in self._axes.items():
            reason = self.unfit(axis)
            if reason:
                method = type(axis.members[0][0]).__name__
                raise UserError(f"{name} {reason}, and {method} at {key} cannot; {suggestion}.")
        if refused := self._scores_by_name() and named.refuses(self._axes):
            raise UserError(f"{name}: {refused}.")

    def _scores_by_name(self) -> bool:
        own = type(self)
        return self.moves and own.score is Allocator.score and own.scores is Allocator.scores

    def _fitting(self) -> list[str]:
        """Methods that this allocator works with."""
        found = []
        for method in PARAMETERIZATIONS:
            try:
                if not any(map(self.unfit, _example_axes(method).values())) and _example_axes(
                    method
                ):
                    found.append(method)
            except (
                Exception
            ):  # a user's unfinished class must not hide the sentence that is to be said
                continue
        return found

    def _check_resume(self, phases: Phases) -> None:
        differs = []
        if self._phases is not None and self._phases != phases:
            differs.append(f"it had {self._phases}, this run has {phases}")
        if self._stored_budget != [self.budget, self.unit]:
            differs.append(
                f"its budget was {self._stored_budget}, this run's is {[self.budget, self.unit]}"
            )
        if set(self._start) != set(self._axes):
            differs.append("its axes are not those of this model")
        if differs:
            raise UserError(
                f"The checkpoint's {type(self).__name__} does not fit this run: {'; '.join(differs)}. Resume with the "
                f"configuration it was saved under, or start a new run from its adapter (model.adapter)."
            )

    def _begin(self) -> None:
        before = self.sizes()
        initial = self.initial_ranks(self.model, self.batches)
        for key, size in (initial or {}).items():
            axis, kept = self._axes[key], min(size, len(self._axes[key]))
            if size > kept and "grow" not in axis.capabilities:
                raise UserError(
                    f"{type(self).__name__} asks {key} for {size} units, it has {kept}, and those of "
                    f"{type(axis.members[0][0]).__name__} cannot grow; start with {size} or more."
                )
            axis.resize(range(kept), size - kept, generator(self.seed, key, 0), self.optimizers)
        self._start = self.sizes()
        self._start_total = self.cost().total(self._start)
        self.begin(self._start)
        if initial is not None:
            grown = {key: n - before[key] for key, n in self._start.items() if n > before[key]}
            pruned = {
                key: list(range(n, before[key]))
                for key, n in self._start.items()
                if n < before[key]
            }
            event: Event = {
                "step": 0,
                "reason": f"ranks to start from, by {type(self).__name__}",
                "unit": self.unit,
            }
            event.update({"sizes": self._start, "grown": grown, "pruned": pruned})
            event.update(self.grounds())
            self._record(event)
        if self.moves:
            self.check_budget(self._start)

    def check_budget(self, sizes: Mapping[str, int]) -> None:
        """Whether the final budget can be met from these sizes.

        Raises:
            ValueError: if it is below the floors, above the start, or would leave all as it is.
        """
        cost, name = self.cost(), type(self).__name__
        start = cost.total(sizes)
        floors = cost.total({key: min(self.floor, size) for key, size in sizes.items()})
        target = self.budget_at(self.phases.end)
        if target is None:
            return
        if target < floors:
            raise UserError(
                f"{name}: a budget of {target} {self.unit} is below {floors}, the cost of {self.floor} unit(s) "
                f"on each of {len(self._axes)} axes; raise `budget` or lower `floor`."
            )
        if target > start:
            raise UserError(
                f"{name}: a budget of {target} {self.unit} is above the {start} the run starts "
                f"with; start with more ranks, or lower `budget`."
            )
        if self.budget is None and type(self).plan is Allocator.plan and target == start:
            raise UserError(
                f"{name} would never act: it prunes to a budget, and has none; set `budget` below the "
                f"{start} {self.unit} of the start."
            )

    def _step(self, step: int) -> Event | None:
        self._steps_done = step
        if step == 1:
            for optimizer in self.optimizers:
                check_optimizer(optimizer)  # now it has state to judge by
        event = None
        with torch.no_grad():
            self.after_step(self._axes)
        if self.moves and (self.phases.is_event(step) or (self._owed and step > self.phases.end)):
            event = self._event(step)
        if self.moves and step >= self.phases.end and not self._owed:
            self._tracked.clear()  # nothing moves any more
        with torch.no_grad():
            self.before_forward(self._axes)
        return event

    @torch.no_grad()
    def _event(self, step: int) -> Event:
        idle = self.examples_needed() > 0 and not self.acts_at(
            step
        )  # a score that runs the model is not asked in vain
        found = {} if idle else self.scores(self._axes)
        scores = {key: self.reduce(values).detach().cpu() for key, values in found.items()}
        cost, budget, before = self.cost(), self.budget_at(step), sum(self.open_sizes().values())
        event: Event = {"step": step, "budget": budget, "unit": self.unit}
        flat = torch.cat([torch.zeros(0), *scores.values()]).double()
        self._owed = bool(flat.isnan().any())
        if self._owed:  # ranks stay; the next event makes up for it, and after the last one every step tries again
            event["reason"] = event["skipped"] = "a score is not a number"
        else:
            # What binds where no budget does: nothing.
            plan: Plan = (
                self.plan(scores, cost, budget if budget is not None else 1 << 62, step)
                if first() and not idle
                else {}
            )
            plan, remark = from_first((plan, self.remark()))
            self._check_plan(plan, cost, budget)
            quarters = (
                flat.quantile(torch.linspace(0, 1, 5, dtype=flat.dtype)).tolist()
                if 0 < len(flat) < 1 << 24
                else []
            )
            event["scores"] = dict(
                zip(("min", "q25", "median", "q75", "max"), quarters, strict=False)
            )
            event.update(self.apply(plan, step, self.optimizers))
            self.carried_out(plan, step)
            event["reason"] = _reason(event, budget, before, sum(self.open_sizes().values()))
            event["reason"] += f"; {remark}" if remark else ""
        self._record(event)
        return event

    def _record(self, event: Event) -> None:
        event["total"] = self.cost().total(self.open_sizes())
        event["active"] = sum(self.open_sizes().values())
        event["allocated"] = sum(self.sizes().values())
        self.events.append(event)

    def apply(self, plan: Plan, step: int, optimizers: Iterable[torch.optim.Optimizer]) -> Event:
        """Carry a plan out on tensors, optimizer state and running averages; returns what was done."""
        done: Event = {"pruned": {}, "grown": {}, "closed": {}, "sizes": {}}
        optimizers = list(optimizers)
        self.closed = {}
        for key, change in plan.items():
            axis = self._axes[key]
            if isinstance(change, Close):
                axis.close(change.units, optimizers)
                self.closed[key] = change.units
                done["closed"][key] = list(change.units)
                continue
            size = len(axis)
            axis.resize(change.keep, change.grow, generator(self.seed, key, step), optimizers)
            self._follow(axis, change)
            gone = sorted(set(range(size)) - set(change.keep))
            if gone:
                done["pruned"][key] = gone
            if change.grow:
                done["grown"][key] = change.grow
            done["sizes"][key] = len(axis)
        return done

    def _follow(self, axis: RankAxis, change: Resize) -> None:
        for tracked in (one for of_axis in self._tracked.values() for one in of_axis.values()):
            for dim in (dim for key, dim in tracked.dims if key == axis.key):
                tensor = tracked.tensor
                index = torch.tensor(change.keep, dtype=torch.long, device=tensor.device)
                kept = tensor.detach().index_select(dim, index)
                shape = list(kept.shape)
                shape[dim] = change.grow
                tracked.tensor = torch.cat([kept, kept.new_zeros(shape)], dim).requires_grad_(
                    tensor.requires_grad
                )

    def _check_plan(self, plan: Plan, cost: CostModel, budget: int | None) -> None:
        """Budget, floors and caps, whoever wrote the plan."""
        sizes, caps = self.sizes(), self.caps()
        for key, change in plan.items():
            if key not in sizes:
                raise RuntimeError(
                    f"{type(self).__name__} planned for {key!r}, which is no axis of this model."
                )
            before = sizes[key]
            sizes[key] = (
                before - len(change.units)
                if isinstance(change, Close)
                else len(change.keep) + change.grow
            )
            cap = caps[key]
            if sizes[key] < min(self.floor, before) or (
                cap is not None and sizes[key] > max(cap, before)
            ):
                raise RuntimeError(
                    f"{type(self).__name__} planned {sizes[key]} units for {key}, outside {self.floor} to {cap}."
                )
        if budget is not None and cost.total(sizes) > budget:
            raise RuntimeError(
                f"{type(self).__name__} planned {cost.total(sizes)} {self.unit}, above the budget of {budget}."
            )
        if (
            self.exact
            and self.unit == "ranks"
            and budget is not None
            and cost.total(sizes) != budget
        ):
            raise RuntimeError(
                f"{type(self).__name__} planned {cost.total(sizes)} ranks; the budget of {budget} is met exactly."
            )

    # ---- as a Lightning callback

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Any LightningModule can resume: its axes take the stored sizes before its weights are loaded.
        pl_module.register_load_state_dict_pre_hook(fit_before_load)  # type: ignore[no-untyped-call]
        if stage != "fit":
            return
        self._restored = False  # a checkpoint that this run resumes from is loaded after setup
        self._running = False
        callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in (c for c in callbacks if isinstance(c, Allocator) and c is not self):
            self._check_beside(other)
        averaging = next(
            (c for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)),
            None,
        )
        if averaging is not None:
            raise UserError(
                f"{type(averaging).__name__} keeps a copy of the weights that cannot follow a rank; leave it out, or run it "
                f"without an allocator."
            )
        keep_apart(trainer, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            rejoin(trainer)

    def _check_beside(self, other: "Allocator") -> None:
        name, second = type(self).__name__, type(other).__name__
        alone = next((type(one).__name__ for one in (self, other) if one.exclusive), None)
        if alone is not None:
            raise UserError(
                f"{name} and {second} are both in this run, and {alone} tolerates no other; keep one."
            )
        if self.moves and other.moves:
            raise UserError(
                f"{name} and {second} would both move the ranks of this model; keep one."
            )
        if self._provides() and other._provides():
            raise UserError(
                f"{name} and {second} would both choose the ranks to start from; keep one."
            )

    @classmethod
    def _provides(cls) -> bool:
        return cls.initial_ranks is not Allocator.initial_ranks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_in(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_in(
            trainer, pl_module
        )  # again, where the strategy has restored a checkpoint only after on_fit_start

    def _start_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._running:  # by on_fit_start, or by the other allocator of the run
            return
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, Allocator) and other._provides() and not self._provides():
                other._start_in(
                    trainer, pl_module
                )  # whatever the order of the list: first the ranks to start from
        total = trainer.estimated_stepping_batches  # it builds the loaders, too
        self.start(
            pl_module,
            trainer.optimizers,
            total,
            batches=_TrainingData(trainer),
            loss=lambda batch: _training_loss(trainer, pl_module, batch),
        )
        for event in self.events[-1:]:
            if event["step"] == 0:
                self._log(pl_module, event)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average_adapters(trainer, pl_module, self, self._leaves())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        add_penalty_gradients(trainer, pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._before_step(1.0 if scaler is None else scaler.get_scale())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # optimizer steps: accumulation must not fire us twice
        if step == self._steps_done:
            return
        event = self._step(step)
        if event is not None:
            self._log(pl_module, event)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.finish()

    def _log(self, pl_module: LightningModule, event: Event) -> None:
        values = {k: event.get(k) for k in ("budget", "total", "active", "allocated")}
        shown = {
            f"ranks/{k}": float(cast(int, value))
            for k, value in values.items()
            if value is not None
        }
        if event["step"]:  # Lightning logs nothing before the first step
            pl_module.log_dict(shown)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        phases = self._phases
        return {
            "budget": [self.budget, self.unit],
            "start": self._start,
            "start_total": self._start_total,
            "phases": None
            if phases is None
            else [phases.total, phases.warmup, phases.final, phases.every],
            "steps_done": self._steps_done,
            "bad_steps": self._bad_steps,
            "owed": self._owed,
            "closed": {key: list(units) for key, units in self.closed.items()},
            "events": self.events,
            "examples": self._examples if _plain(self._examples) else None,
            "tracked": {
                key: {
                    name: {"tensor": one.tensor, "dims": [list(dim) for dim in one.dims]}
                    for name, one in of_axis.items()
                }
                for key, of_axis in self._tracked.items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored, self._running = True, False
        self._stored_budget = state_dict["budget"]
        self._start, self._start_total = state_dict["start"], state_dict["start_total"]
        self._phases = Phases(*state_dict["phases"]) if state_dict["phases"] else None
        self._steps_done, self._bad_steps = state_dict["steps_done"], state_dict["bad_steps"]
        self._owed = state_dict["owed"]
        self.closed = {key: tuple(units) for key, units in state_dict["closed"].items()}
        self.events = list(state_dict["events"])
        self._examples = state_dict["examples"]
        self._tracked = {
            key: {
                name: Tracked(one["tensor"], tuple((k, d) for k, d in one["dims"]))
                for name, one in of_axis.items()
            }
            for key, of_axis in state_dict["tracked"].items()
        }

    @property
    def state_key(self) -> str:
        """One allocator a run: its state is found by its class."""
        return type(self).__qualname__

    @classmethod
    def works_with(cls, *methods: str) -> bool:
        """Whether a parameterization, by its class name, has what this allocator needs, both with their default arguments.

        Several names are a nest, innermost first.
        """
        return cls.pair(*methods) == "works"

    @classmethod
    def pair(cls, *methods: str) -> str:
        """What becomes of this allocator on a parameterization, or a nest: "works"; "init=False" and the like, where it works with
        that option off; or "" where it is refused. All else is at its default."""
        axes = _example_axes(*methods)
        if not axes or inspect.isabstract(cls):
            return ""
        try:
            allocator = cls()
        except TypeError:  # a user's own, with arguments that have no default
            return (
                "works" if all(cls.requires <= axis.capabilities for axis in axes.values()) else ""
            )
        if not any(map(allocator.unfit, axes.values())):
            return "works"
        off = {
            name: _off(getattr(allocator, name)) for name in cls.options if getattr(allocator, name)
        }
        for name, value in off.items():
            setattr(allocator, name, value)
        works = off and not any(map(allocator.unfit, axes.values()))
        return ", ".join(f"{name}={value!r}" for name, value in off.items()) if works else ""


class _TrainingData:
    """The batches of the trainer's loader, on the device; reading them does not move the loader that training reads."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        if (
            self._trainer.train_dataloader is None
        ):  # max_steps alone ends the run: nobody had to count its batches
            self._trainer.fit_loop.setup_data()
        devices = (
            [self._trainer.strategy.root_device]
            if self._trainer.strategy.root_device.type == "cuda"
            else []
        )
        with torch.random.fork_rng(devices=devices):  # a DataLoader draws the seed of its workers
            batches = iter(copy.copy(self._trainer.train_dataloader) or ())
        while True:
            with torch.random.fork_rng(devices=devices):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield self._trainer.strategy.batch_to_device(batch)


def _training_loss(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
    logs = ("log", "log_dict")
    for name in logs:
        module.__dict__[name] = _log_nothing
    try:
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(batch, 0)
    finally:
        for name in logs:
            del module.__dict__[name]
    return cast(Tensor, output["loss"] if isinstance(output, Mapping) else output)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """A module's `log` while the loss is only looked at."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the random state put back: what is only looked at must leave no trace in the training."""
    modes = {module: module.training for module in model.modules()}
    cuda = next((p.device for p in model.parameters() if p.is_cuda), None)
    with torch.random.fork_rng(devices=[] if cuda is None else [cuda]):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _plain(value: Any) -> bool:
    """Whether a checkpoint that is loaded with weights_only=True can hold it."""
    if type(value) is dict:
        return all(isinstance(key, str | int) and _plain(one) for key, one in value.items())
    if type(value) in (list, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, Tensor | str | int | float | bool)


def _words(capabilities: Iterable[str]) -> str:
    return ", ".join(sorted(capabilities))


def _off(value: Any) -> Any:
    return None if value is None or isinstance(value, str) else type(value)()


def _reason(event: Event, budget: int | None, before: int, after: int) -> str:
    lost = sum(map(len, event["pruned"].values()))
    counts = {
        "pruned": lost,
        "closed": sum(map(len, event["closed"].values())),
        "grown": sum(event["grown"].values()),
    }
    done = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "nothing moved"
    limit = "no budget binds" if budget is None else f"budget {budget} {event['unit']}"
    return f"{limit}: {done}, {before} -> {after} open units"


def _example_axes(*methods: str) -> dict[str, RankAxis]:
    """The axes of a nest of methods with default arguments, on the example of the innermost one."""
    holder = nn.Module()
    if len(methods) == 1:
        holder.layer = on_example(PARAMETERIZATIONS[methods[0]])
        return rank_axes(holder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = PARAMETERIZATIONS[methods[0]].example()
        for method in methods:
            layer = PARAMETERIZATIONS[method](layer)
    holder.layer = layer
    return rank_axes(holder)


def _beside(layer: Parameterization, methods: Sequence[str]) -> str:
    """How to nest one of the methods on such a layer, for a sentence; empty where none can wrap it."""
    kinds = {method: PARAMETERIZATIONS[method] for method in methods}
    merges = all(wrapper.mergeable for wrapper in layer.nest)
    fits = [
        m
        for m, cls in kinds.items()
        if cls.wraps(layer.innermost) and (merges or not cls.reads_weight)
    ]
    if not fits:
        return ""
    known = min(fits, key=lambda method: kinds[method].source)  # the oldest is the best known
    return f", or nest one: [{', '.join([*(type(wrapper).__name__ for wrapper in layer.nest), known])}]"


def fit_before_load(
    module: torch.nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """A load pre-hook that gives the axes of a model the sizes that its state dict has."""
    if not prefix:
        fit_ranks(module, state_dict)
