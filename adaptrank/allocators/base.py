"""The callback that joins a score, a schedule and a plan; the only impure file of this folder."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from adaptrank.allocators import scores as scoring
from adaptrank.allocators.plans import Close, Plan, Resize, Scores, keep_best
from adaptrank.allocators.schedules import Phases, cubic, steps
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
from adaptrank.parameterizations.base import (
    PARAMETERIZATIONS,
    Parameterization,
    adapted_part,
    on_example,
    wrapped_layers,
    wrappers,
)
from adaptrank.registry import Registry
from adaptrank.regularize import add_penalty_gradients

ALLOCATORS: Registry["Allocator"] = Registry("allocator")
"""Class name -> class."""

Axes = Mapping[str, RankAxis]


class Event(TypedDict, total=False):
    """What happened at a step; a line of `ranks.jsonl`."""

    step: int
    budget: int
    unit: str
    total: int  # of what is open, in the unit of the budget
    active: int  # open units
    allocated: int  # units that take memory
    sizes: dict[str, int]  # of the axes that changed, after the event
    pruned: dict[str, list[int]]
    grown: dict[str, int]
    closed: dict[str, list[int]]
    scores: dict[str, float]
    skipped: str


class Allocator(Callback):
    """Decides how many units each rank axis keeps, and when that changes.

    A subclass overrides `score`, seldom more: by default every event keeps the units with most importance per cost,
    within a budget that falls from the total at the start to `budget` on AdaLoRA's cubic curve. It works on any
    LightningModule that holds wrappers. Events fall on optimizer steps, after the step; the number of steps comes from the
    trainer. Every event is in `events`, in the log, and in the checkpoint.

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
            raise ValueError(f"unit={unit!r}; a budget counts 'ranks' or 'parameters'.")
        if every < 1 or floor < 1 or (cap is not None and cap < floor) or (budget is not None and budget < 1):
            raise ValueError(
                f"every={every}, floor={floor}, cap={cap}, budget={budget}: all are at least 1, and cap at least floor."
            )
        steps(warmup, 0), steps(final, 0)
        self.budget, self.unit, self.every = budget, unit, every
        self.warmup, self.final = warmup, final
        self.floor, self.cap, self.seed = floor, cap, seed
        self._axes: Axes = {}
        self._restored = False
        self._stored_budget: list[int | str | None] = [budget, unit]  # of the checkpoint, once one is loaded
        self._forget()

    def _forget(self) -> None:
        """The state of a run that has not begun."""
        self.events: list[Event] = []
        self.closed: dict[str, tuple[int, ...]] = {}  # units that a plan closed, until the next event
        self._tracked: dict[str, dict[str, tuple[Tensor, int]]] = {}
        self._start: dict[str, int] = {}  # size of each axis when the run began
        self._start_total = 0
        self._phases: Phases | None = None
        self._last_step = -1
        self._bad_steps = 0
        self._owed = False  # the last event was put off

    # ---- what a method writes

    def initial_ranks(self, model: LightningModule, batches: Iterable[Any]) -> dict[str, int] | None:
        """Sizes to begin the run with, {axis: units}, or None to take the model as it is."""
        return None

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Called once, with the sizes that a new run starts from; the place to refuse those that make no sense."""

    def before_forward(self, axes: Axes) -> None:
        """Called before each training batch."""

    def observe(self, axes: Axes) -> None:
        """Feed running averages; gradients are complete, unscaled and unclipped, the step is not made yet."""
        for axis in axes.values():
            scoring.IMPORTANCES[self.importance].observe(axis, partial(self.track, axis), self.beta)

    def score(self, axis: RankAxis) -> Tensor:
        """Importance of each unit, (units,); higher is kept."""
        return scoring.IMPORTANCES[self.importance].score(axis, partial(self.track, axis))

    def budget_at(self, step: int) -> int:
        """The total that binds after the event at `step`."""
        target = self._start_total if self.budget is None else self.budget
        return cubic(self._start_total, target, self.phases.progress(step))

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        """What to keep, close and grow; pure."""
        return keep_best(scores, cost, budget, self.floor)

    def acts_at(self, step: int) -> bool:
        """Whether an event at this step could move anything; a run in which none could is refused at its start."""
        return True

    def after_step(self, axes: Axes) -> None:
        """Called after each optimizer step, before the event if there is one."""

    # ---- what the library provides

    def track(self, axis: RankAxis, name: str, tensor: Tensor, dim: int = 0) -> Tensor:
        """The running tensor `name` of an axis: it follows every resize along `dim`, and goes into the checkpoint.

        Args:
            axis: whose units dimension `dim` counts.
            name: any name.
            tensor: what it starts from, if there is none of that name.
            dim: dimension that counts the units; fresh units are zero.
        """
        tracked = self._tracked.setdefault(axis.key, {})
        if name not in tracked:
            tracked[name] = (tensor.detach().clone(), dim)
        return tracked[name][0]

    @property
    def phases(self) -> Phases:
        """The phases of this run, in steps; known once it has started."""
        if self._phases is None:
            raise RuntimeError(f"{type(self).__name__} learns its steps from the trainer when the run starts.")
        return self._phases

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

    def _cost(self, model: LightningModule) -> CostModel:
        return rank_cost(self._axes) if self.unit == "ranks" else cost_model(adapted_part(model))

    # ---- the shell

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Any LightningModule can resume: its axes take the stored sizes before its weights are loaded.
        pl_module.register_load_state_dict_pre_hook(_fit_before_load)  # type: ignore[no-untyped-call]
        if stage != "fit":
            return
        self._restored = False  # a checkpoint that this run resumes from is loaded after setup
        callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, Allocator) and c is not self]
        if others:
            raise ValueError(
                f"{type(self).__name__} and {type(others[0]).__name__} would both move the ranks of this model; keep one."
            )
        averaging = next((c for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)), None)
        if averaging is not None:
            raise ValueError(
                f"{type(averaging).__name__} keeps a copy of the weights that cannot follow a rank; leave it out, or run it "
                f"without an allocator."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._axes = {key: axis for key, axis in rank_axes(adapted_part(pl_module)).items() if axis.trainable()}
        self._check_axes(pl_module)
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer)
        phases = self.phases_of(trainer.estimated_stepping_batches)
        resumed, self._restored = self._restored, False
        if resumed:
            self._check_resume(phases)
        else:
            self._forget()
        self.check_schedule(phases)
        if not resumed:
            self._begin(trainer, pl_module)
        for tracked in self._tracked.values():
            tracked.update({name: (tensor.to(pl_module.device), dim) for name, (tensor, dim) in tracked.items()})

    def phases_of(self, total: float) -> Phases:
        """The phases of a run of `total` optimizer steps.

        Raises:
            ValueError: if the run has no end.
        """
        if not math.isfinite(total):
            raise ValueError(f"{type(self).__name__} needs to know where training ends; set max_steps or max_epochs.")
        return Phases(int(total), steps(self.warmup, int(total)), steps(self.final, int(total)), self.every)

    def check_schedule(self, phases: Phases) -> None:
        """Take these phases, if an event in them can move anything.

        Raises:
            ValueError: if it would never act.
        """
        self._phases = phases
        if phases.end <= phases.warmup:
            raise ValueError(
                f"{type(self).__name__} would never act: its warm-up of {phases.warmup} and final {phases.final} steps leave "
                f"none of the {phases.total} steps of this run; shorten them, or raise max_steps."
            )
        if not any(self.acts_at(step) for step in phases.events()):
            raise ValueError(
                f"{type(self).__name__} would never act: with an event every {phases.every} steps between {phases.warmup} and "
                f"{phases.end}, none moves a unit; lower `every`, or raise max_steps."
            )

    def _check_axes(self, pl_module: LightningModule) -> None:
        name, fits = type(self).__name__, self._fitting()
        suggestion = f"use one of {', '.join(fits)}" if fits else "no parameterization here can"
        if not self._axes:
            found = wrappers(pl_module)
            methods = ", ".join(sorted({type(wrapper).__name__ for wrapper in found}))
            if any(wrapper.axes for wrapper in found):
                raise ValueError(f"{name} has nothing to allocate: no tensor of a rank axis of {methods} is trained.")
            what = f"{methods} has no rank axis" if methods else "the model has no adapter"
            beside = _beside(next(iter(wrapped_layers(pl_module).values())), fits) if found else ""
            raise ValueError(f"{name} has nothing to allocate: {what}; {suggestion}{beside}.")
        for key, axis in self._axes.items():
            missing = self.requires - axis.capabilities
            if missing:
                method = type(axis.members[0][0]).__name__
                raise ValueError(
                    f"{name} needs axes that can {', '.join(sorted(missing))}, and {method} at {key} cannot; {suggestion}."
                )

    def _fitting(self) -> list[str]:
        """Methods that this allocator works with."""
        found = []
        for method in PARAMETERIZATIONS:
            try:
                if self.works_with(method):
                    found.append(method)
            except Exception:  # a user's unfinished class must not hide the sentence that is to be said
                continue
        return found

    def _check_resume(self, phases: Phases) -> None:
        differs = []
        if self._phases is not None and self._phases != phases:
            differs.append(f"it had {self._phases}, this run has {phases}")
        if self._stored_budget != [self.budget, self.unit]:
            differs.append(f"its budget was {self._stored_budget}, this run's is {[self.budget, self.unit]}")
        if set(self._start) != set(self._axes):
            differs.append("its axes are not those of this model")
        if differs:
            raise ValueError(
                f"The checkpoint's {type(self).__name__} does not fit this run: {'; '.join(differs)}. Resume with the "
                f"configuration it was saved under, or start a new run from its adapter (model.adapter)."
            )

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.train_dataloader if type(self).initial_ranks is not Allocator.initial_ranks else ()
        initial = self.initial_ranks(pl_module, batches or ())
        for key, size in (initial or {}).items():
            axis, kept = self._axes[key], min(size, len(self._axes[key]))
            axis.resize(range(kept), size - kept, generator(self.seed, key, 0), trainer.optimizers)
        cost = self._cost(pl_module)
        self._start = self.sizes()
        self.begin(self._start)
        self._start_total = cost.total(self._start)
        floors = cost.total({key: min(self.floor, size) for key, size in self._start.items()})
        target = self.budget_at(self.phases.end)
        if target < floors:
            raise ValueError(
                f"{type(self).__name__}: a budget of {target} {self.unit} is below {floors}, the cost of {self.floor} unit(s) "
                f"on each of {len(self._axes)} axes; raise `budget` or lower `floor`."
            )
        if target > self._start_total:
            raise ValueError(
                f"{type(self).__name__}: a budget of {target} {self.unit} is above the {self._start_total} the run starts "
                f"with; start with more ranks, or lower `budget`."
            )
        if self.budget is None and type(self).plan is Allocator.plan and target == self._start_total:
            raise ValueError(
                f"{type(self).__name__} would never act: it prunes to a budget, and has none; set `budget` below the "
                f"{self._start_total} {self.unit} of the start."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.before_forward(self._axes)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        add_penalty_gradients(trainer, pl_module)
        if trainer.global_step >= self.phases.end and not self._owed:
            return
        grads = [s.tensor.grad for axis in self._axes.values() for s in axis.slots() if s.tensor.grad is not None]
        if grads and not torch.isfinite(torch.stack([g.sum() for g in grads]).sum()):
            self._bad_steps += 1
            if self._bad_steps == 50:
                raise RuntimeError(
                    "Gradients were not finite for 50 optimizer steps in a row; lower the learning rate."
                )
            return
        self._bad_steps = 0
        with torch.no_grad():
            self.observe(self._axes)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # optimizer steps: accumulation must not fire us twice
        if step == self._last_step or (self._last_step < 0 and step == 0):
            return
        self._last_step = step
        if step == 1:
            for optimizer in trainer.optimizers:
                check_optimizer(optimizer)  # now it has state to judge by
        with torch.no_grad():
            self.after_step(self._axes)
        if self.phases.is_event(step) or (self._owed and step > self.phases.end):
            self._event(trainer, pl_module, step)
        if step >= self.phases.end and not self._owed:
            self._tracked.clear()  # nothing moves any more

    @torch.no_grad()
    def _event(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        scores = {key: trainer.strategy.reduce(self.score(axis), reduce_op="mean") for key, axis in self._axes.items()}
        scores = {key: values.detach().cpu() for key, values in scores.items()}
        cost, budget = self._cost(pl_module), self.budget_at(step)
        event: Event = {"step": step, "budget": budget, "unit": self.unit}
        flat = torch.cat(list(scores.values()))
        self._owed = bool(flat.isnan().any())
        if self._owed:  # ranks stay; the next event makes up for it, and after the last one every step tries again
            event["skipped"] = "a score is not a number"
        else:
            plan: Plan = self.plan(scores, cost, budget, step) if trainer.is_global_zero else {}
            plan = trainer.strategy.broadcast(plan)
            self._check_plan(plan, cost, budget)
            event["scores"] = {"min": float(flat.min()), "median": float(flat.median()), "max": float(flat.max())}
            event.update(self.apply(plan, step, trainer.optimizers))
        event["total"] = cost.total(self.open_sizes())
        event["active"] = sum(self.open_sizes().values())
        event["allocated"] = sum(self.sizes().values())
        self.events.append(event)
        pl_module.log_dict({f"ranks/{k}": float(event[k]) for k in ("budget", "total", "active", "allocated")})

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
        for name, (tensor, dim) in self._tracked.get(axis.key, {}).items():
            index = torch.tensor(change.keep, dtype=torch.long, device=tensor.device)
            kept = tensor.index_select(dim, index)
            shape = list(kept.shape)
            shape[dim] = change.grow
            self._tracked[axis.key][name] = (torch.cat([kept, kept.new_zeros(shape)], dim), dim)

    def _check_plan(self, plan: Plan, cost: CostModel, budget: int) -> None:
        """Budget, floors and caps, whoever wrote the plan."""
        sizes, caps = self.sizes(), self.caps()
        for key, change in plan.items():
            if key not in sizes:
                raise RuntimeError(f"{type(self).__name__} planned for {key!r}, which is no axis of this model.")
            before = sizes[key]
            sizes[key] = before - len(change.units) if isinstance(change, Close) else len(change.keep) + change.grow
            cap = caps[key]
            if sizes[key] < min(self.floor, before) or (cap is not None and sizes[key] > max(cap, before)):
                raise RuntimeError(
                    f"{type(self).__name__} planned {sizes[key]} units for {key}, outside {self.floor} to {cap}."
                )
        if cost.total(sizes) > budget:
            raise RuntimeError(
                f"{type(self).__name__} planned {cost.total(sizes)} {self.unit}, above the budget of {budget}."
            )
        if self.unit == "ranks" and cost.total(sizes) != budget:
            raise RuntimeError(
                f"{type(self).__name__} planned {cost.total(sizes)} ranks; the budget of {budget} is met exactly."
            )

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        phases = self._phases
        return {
            "budget": [self.budget, self.unit],
            "start": self._start,
            "start_total": self._start_total,
            "phases": None if phases is None else [phases.total, phases.warmup, phases.final, phases.every],
            "last_step": self._last_step,
            "bad_steps": self._bad_steps,
            "owed": self._owed,
            "closed": {key: list(units) for key, units in self.closed.items()},
            "events": self.events,
            "tracked": {
                key: {n: {"tensor": t, "dim": d} for n, (t, d) in v.items()} for key, v in self._tracked.items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = True
        self._stored_budget = state_dict["budget"]
        self._start, self._start_total = state_dict["start"], state_dict["start_total"]
        self._phases = Phases(*state_dict["phases"]) if state_dict["phases"] else None
        self._last_step, self._bad_steps = state_dict["last_step"], state_dict["bad_steps"]
        self._owed = state_dict["owed"]
        self.closed = {key: tuple(units) for key, units in state_dict["closed"].items()}
        self.events = list(state_dict["events"])
        self._tracked = {
            key: {n: (v["tensor"], v["dim"]) for n, v in tensors.items()}
            for key, tensors in state_dict["tracked"].items()
        }

    @property
    def state_key(self) -> str:
        """One allocator a run: its state is found by its class."""
        return type(self).__qualname__

    @classmethod
    def works_with(cls, method: str) -> bool:
        """Whether a parameterization, by its class name, has what this allocator needs, with its default arguments."""
        layer = on_example(PARAMETERIZATIONS[method])
        return bool(layer.axes) and not inspect.isabstract(cls) and cls.requires <= layer.capabilities


def _beside(layer: Parameterization, methods: Sequence[str]) -> str:
    """How to nest one of the methods on such a layer, for a sentence; empty where none can wrap it."""
    kinds = {method: PARAMETERIZATIONS[method] for method in methods}
    merges = all(wrapper.mergeable for wrapper in layer.nest)
    fits = [m for m, cls in kinds.items() if cls.wraps(layer.innermost) and (merges or not cls.reads_weight)]
    if not fits:
        return ""
    known = min(fits, key=lambda method: kinds[method].source)  # the oldest is the best known
    return f", or nest one: [{', '.join([*(type(wrapper).__name__ for wrapper in layer.nest), known])}]"


def _fit_before_load(module: torch.nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    if not prefix:
        fit_ranks(module, state_dict)
