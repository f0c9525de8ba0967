"""Refusals: runs, budgets and plans that make no sense, each in one sentence."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from adaptrank._errors import UserError, UserTypeError
from adaptrank.allocation import compatibility
from adaptrank.allocation.budget import floor_of
from adaptrank.allocation.context import Run
from adaptrank.allocation.plans import Close, Plan
from adaptrank.allocation.schedules import Phases
from adaptrank.allocation.taking_part import why_none
from adaptrank.axes import CostModel
from adaptrank.parameterizations import wrapped_layers, wrappers

if TYPE_CHECKING:
    from adaptrank.allocation.participant import Participant


SHORT_FORM = {
    "observe": "update(state, axes)",
    "score": "score_units(state, axes)",
    "scores": "score_units(state, axes)",
    "attach": "install(state, axes)",
    "before_forward": "before_pass(state, axes)",
    "after_step": "finish_step(state, axes)",
    "carried_out": "carry_out(state, plan, step, apply)",
    "begin": "check_start(sizes)",
    "initial_ranks": "choose(axes, batches)",
    "remark": "propose(state, scores, cost, budget, step)",
}
"""Method of the short form (`Allocator`) -> method of the contract."""


def check_form(participant: "Participant") -> None:
    """Check that a class does not define methods of the short form, which nobody would call.

    Raises:
        TypeError: naming the method of the contract to write instead.
    """
    if participant.short_form:
        return
    for name, contract in SHORT_FORM.items():
        if hasattr(participant, name):
            raise UserTypeError(
                f"{participant.label} defines {name}(), a method of the short form, which is not "
                f"called here; write {contract}, or derive from adaptrank.Allocator."
            )


def phases_of(participant: "Participant", total_steps: float) -> Phases:
    """Return the phases of a run of `total_steps` optimizer steps.

    Raises:
        ValueError: if the run has no end.
    """
    if not math.isfinite(total_steps):
        raise UserError(
            f"{participant.label} needs to know where training ends; set max_steps or max_epochs."
        )
    return participant.phases_of(int(total_steps))


def check_schedule(participant: "Participant", phases: Phases) -> None:
    """Check that an event of these phases can move a unit.

    Raises:
        ValueError: if the allocator would never act.
    """
    if not participant.moves:
        return
    if phases.end <= phases.warmup:
        raise UserError(
            f"{participant.label} would never act: its warm-up of {phases.warmup} and final "
            f"{phases.final} steps leave none of the {phases.total} steps of this run; shorten "
            f"them, or raise max_steps."
        )
    if not any(participant.acts_at(step) for step in phases.events()):
        raise UserError(
            f"{participant.label} would never act: with an event every {phases.every} steps "
            f"between {phases.warmup} and {phases.end}, none moves a unit; lower `every`, or "
            f"raise max_steps."
        )


def check_rest(participant: "Participant", step: int) -> None:
    """Check that no event is due while the axes do not train, which is up to a step.

    Raises:
        UserError: if the warm-up is shorter.
    """
    warmup = participant.phases.warmup
    if participant.moves and warmup < step:
        raise UserError(
            f"{participant.label} warms up for {warmup} steps, and its axes do not train before "
            f"step {step + 1}; give it warmup={step} or more."
        )


def check_axes(participant: "Participant", run: Run) -> None:
    """Check that the model has axes, and that each of them fits the allocator.

    Raises:
        ValueError: if there is nothing to allocate, or a method cannot do what is needed.
    """
    name = participant.label
    if not run.axes:
        raise UserError(f"{name} has nothing to allocate: {_why_nothing(participant, run)}.")
    for key, axis in run.axes.items():
        reason = compatibility.misfit(participant, axis)
        if reason:
            method = type(axis.members[0][0]).__name__
            suggestion = compatibility.suggestion(participant)
            raise UserError(f"{name} {reason}, and {method} at {key} cannot; {suggestion}.")
    refused = participant.refuses(run.axes)
    if refused:
        raise UserError(f"{name}: {refused}.")


def _why_nothing(participant: "Participant", run: Run) -> str:
    model_wrappers = wrappers(run.model)
    methods = ", ".join(sorted({type(wrapper).__name__ for wrapper in model_wrappers}))
    if run.left_out:
        return why_none(run.left_out)
    if any(wrapper.axes for wrapper in model_wrappers):
        return f"no tensor of a rank axis of {methods} is trained"
    suggestion = compatibility.suggestion(participant)
    if not model_wrappers:
        return f"the model has no adapter; {suggestion}"
    layer = next(iter(wrapped_layers(run.model).values()))
    beside = compatibility.nesting_hint(participant, layer)
    return f"{methods} has no rank axis; {suggestion}{beside}"


def check_gates(participant: "Participant", run: Run) -> None:
    """Check that no optimizer mixes units that the allocator multiplies by gates.

    Raises:
        ValueError: naming the allocator and the optimizer.
    """
    for optimizer in run.owners():
        if participant.hangs_gates and getattr(optimizer, "mixes_units", False):
            raise UserError(
                f"{participant.label} multiplies single units by gates, and "
                f"{type(optimizer).__name__} mixes the units of a pair of factors, so that a gate "
                f"has no meaning; use torch.optim.AdamW, or an allocator without gates, such as "
                f"AdaLoRA."
            )


def check_budget(participant: "Participant", run: Run) -> None:
    """Check that the final budget can be met from the sizes at the start, and that units can move.

    Raises:
        ValueError: if it is below the floors or above the start, pays for no unit, leaves all as it
            is, or leaves its floor to every axis.
    """
    cost, name, unit = run.cost(), participant.label, run.unit
    start, wanted = run.start_total, participant.floors()
    floors = {key: min(floor_of(wanted, key), size) for key, size in run.start_sizes.items()}
    least, floor = cost.total(floors), max((floor_of(wanted, key) for key in floors), default=0)
    advice = "raise `budget` or lower `floor`" if participant.floor else "raise `budget`"
    smallest = smallest_adapter(run)
    if smallest is None:
        raise UserError(
            f"{name} has nothing to allocate: no layer has units at the start; start with a higher "
            f"rank."
        )
    target = participant.budget_at(run.phases.end)
    if target is None:
        return
    if target < least:
        raise UserError(
            f"{name}: a budget of {target} {unit} is below {least}, the cost of {floor} unit(s) "
            f"on each of {len(run.axes)} axes; {advice}."
        )
    if target > start:
        raise UserError(
            f"{name}: a budget of {target} {unit} is above the {start} the run starts with; "
            f"start with more ranks, or lower `budget`."
        )
    if participant.only_prunes and start in (target, participant.budget):
        what = "has none" if participant.budget is None else "this one leaves all as it is"
        raise UserError(
            f"{name} would never act: it prunes to a budget, and {what}; set `budget` below the "
            f"{start} {unit} of the start."
        )
    if target < cost.total(smallest):
        raise UserError(
            f"{name}: a budget of {target} {unit} leaves no layer a unit, and the cheapest layer "
            f"needs {cost.total(smallest)}; raise `budget`, or start with a higher rank."
        )
    may_keep = [key for key, size in run.start_sizes.items() if size > floors[key]]
    fits = any(least + cost.marginal(key, floors) <= target for key in may_keep)
    if participant.budget is not None and floor and not fits:
        raise UserError(
            f"{name}: a budget of {target} {unit} leaves the floor of {floor} unit(s) to each of "
            f"{len(run.axes)} axes, and nothing to decide; {advice}."
        )


def smallest_adapter(run: Run) -> dict[str, int] | None:
    """Return the sizes of the cheapest adapter that changes anything.

    One layer has one unit on each of its axes, and all others have none. It is None if no layer has
    units on all of its axes.
    """
    axes_of_layer: dict[int, list[str]] = {}
    for key, axis in run.axes.items():
        for layer, _ in axis.members:
            axes_of_layer.setdefault(id(layer), []).append(key)
    sizes, none = run.sizes(), dict.fromkeys(run.axes, 0)
    adapters = []
    for keys in axes_of_layer.values():
        if all(sizes[key] for key in keys):
            adapters.append(none | dict.fromkeys(keys, 1))
    return min(adapters, key=run.cost().total, default=None)


def check_plan(
    participant: "Participant", run: Run, plan: Plan, cost: CostModel, budget: int | None
) -> None:
    """Check budget, floors and caps of a plan, whoever wrote it.

    Raises:
        RuntimeError: if the plan breaks one of them.
    """
    name = participant.label
    sizes, caps = run.sizes(), participant.caps()
    for key, change in plan.items():
        if key not in sizes:
            raise RuntimeError(f"{name} planned for {key!r}, which is no axis of this model.")
        size = sizes[key]
        if isinstance(change, Close):
            sizes[key] = size - len(change.units)
        else:
            sizes[key] = len(change.keep) + change.grow
        cap = caps[key]
        too_small = sizes[key] < min(participant.floor, size)
        too_large = cap is not None and sizes[key] > max(cap, size)
        if too_small or too_large:
            raise RuntimeError(
                f"{name} planned {sizes[key]} units for {key}, outside {participant.floor} to "
                f"{cap}."
            )
    if budget is None:
        return
    total = cost.total(sizes)
    if total > budget:
        raise RuntimeError(f"{name} planned {total} {run.unit}, above the budget of {budget}.")
    if participant.exact and run.unit == "ranks" and total != budget:
        raise RuntimeError(f"{name} planned {total} ranks; the budget of {budget} is met exactly.")


def check_can_prune(participant: "Participant", sizes: Mapping[str, int]) -> None:
    """Check that at least one axis has more units than its floor, and that the last unit may stay.

    Raises:
        ValueError: if every axis starts at its floor, or there is only one unit.
    """
    floor, floors = participant.floor, participant.floors()
    if sum(sizes.values()) == 1:
        raise UserError(
            f"{participant.label} would never act: the adapter has one unit in all; start with a "
            f"higher rank."
        )
    if all(size <= floor_of(floors, key) for key, size in sizes.items()):
        raise UserError(
            f"{participant.label} would never act: every axis starts at its floor of {floor} "
            f"unit(s), and none can be pruned; start with a higher rank."
        )


def check_beside(participant: "Participant", other: "Participant") -> None:
    """Check that two allocators can take part in one run.

    Raises:
        ValueError: if both move ranks, both choose the first ranks, or one tolerates no other.
    """
    name, second = participant.label, other.label
    alone = next((one.label for one in (participant, other) if one.exclusive), None)
    if alone is not None:
        raise UserError(
            f"{name} and {second} are both in this run, and {alone} tolerates no other; keep one."
        )
    if participant.moves and other.moves:
        raise UserError(f"{name} and {second} would both move the ranks of this model; keep one.")
    if participant.chooses_ranks and other.chooses_ranks:
        raise UserError(f"{name} and {second} would both choose the ranks to start from; keep one.")


def shortfall(participant: "Participant") -> str:
    """Return one sentence about a run that is over before its last event, "" if all is well.

    It is about units that are closed and still there, and about a budget that is exceeded.
    """
    run = participant.run
    if not (participant.moves and run.moves_left):
        return ""
    closed = sum(map(len, run.progress.closed.values()))
    sizes = run.sizes()
    target = participant.budget_at(run.phases.end)
    cost = run.cost().total(sizes)
    excess = 0 if target is None else max(0, cost - target)
    if not (closed or excess):
        return ""
    units = sum(sizes.values())
    budget = f", and its budget of {target} {run.unit} is exceeded by {excess}" if excess else ""
    return (
        f"{participant.label} was stopped at step {run.steps_done}, before its last event at step "
        f"{run.phases.end}: the adapter holds {units} units, {closed} of them closed{budget}. "
        f"Resume the run to its end, or shorten the phases of the allocator."
    )
