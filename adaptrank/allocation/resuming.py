"""Description of a run in its allocator's state, and the checks of a run that resumes from it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from adaptrank._errors import ListedError, UserError
from adaptrank.allocation.context import Axes, Run
from adaptrank.allocation.schedules import Phases
from adaptrank.allocation.state import TrackedTensors
from adaptrank.checkpoints import (
    WHAT_TO_TYPE,
    WORDED_BY_THE_ENGINE,
    compare_nests,
    compare_settings,
    describe_nests,
)

if TYPE_CHECKING:
    from adaptrank.allocation.participant import Participant

UNCHECKED = (
    "The state of %s was stored by an earlier version, without its arguments and the adapters'. "
    "They cannot be compared, and are taken to be the same."
)


def describe_run(participant: "Participant", model: nn.Module | None) -> dict[str, Any]:
    """Return class and arguments of an allocator, and the nests of the model, for a checkpoint."""
    return {
        "class": participant.label,
        "init_args": participant.init_args,
        "nests": [] if model is None else describe_nests(model),
    }


def check_resume(
    participant: "Participant", run: Run, phases: Phases, stored_run: Mapping[str, Any] | None
) -> None:
    """Check that the state of a checkpoint belongs to this run.

    Args:
        participant: the allocator that goes on. Its `accept_changes` accepts another schedule,
            budget and other arguments.
        run: with the progress that was loaded.
        phases: phases of this run.
        stored_run: what `describe_run` returned in the run that was saved, or None if the
            checkpoint is older than that.
    Raises:
        ValueError: naming each difference.
    """
    stored = run.progress
    differences = []
    if stored.phases is not None and stored.phases != phases:
        differences.append(f"it had {stored.phases}, this run has {phases}")
    budget = (participant.budget, participant.unit)
    if stored.budget != budget:
        differences.append(f"its budget was {list(stored.budget)}, this run's is {list(budget)}")
    if stored_run is not None:
        differences += _other_settings(participant, run, stored_run)
    other_axes = set(stored.start_sizes) != set(run.axes)
    if other_axes:
        differences.append("its axes are not those of this model")
    if other_axes or (differences and not participant.accept_changes):
        raise ListedError(
            f"The checkpoint's {participant.label} does not fit this run: "
            f"{'; '.join(differences)}.\n{WHAT_TO_TYPE}"
        )


def _other_settings(participant: "Participant", run: Run, stored: Mapping[str, Any]) -> list[str]:
    """Return the arguments of the allocator and of the adapters that differ, as clauses."""
    if stored.get("class") != participant.label:
        return [f"the allocator is {participant.label} here and {stored.get('class')} there"]
    here = participant.init_args
    there = participant.present_arguments(stored.get("init_args", {}))
    differences = [
        difference
        for difference in compare_settings(here, there, participant.argument_defaults())
        if difference.name not in WORDED_BY_THE_ENGINE
    ]
    differences += compare_nests(describe_nests(run.model), stored.get("nests", []))
    return [difference.clause for difference in differences]


def check_tracked(participant: "Participant", state: TrackedTensors, axes: Axes) -> None:
    """Check that stored tensors have the sizes of the axes that they follow.

    Raises:
        UserError: naming a tensor that does not.
    """
    for key, name, tracked in state.items():
        shape = tuple(tracked.tensor.shape)
        for axis, dim in tracked.dims:
            known = axis in axes and 0 <= dim < len(shape)
            if not known or shape[dim] != len(axes[axis]):
                size = f"{len(axes[axis])} units" if axis in axes else "no such axis"
                raise UserError(
                    f"The checkpoint's state of {participant.label} is damaged: {name!r} of {key} "
                    f"has shape {shape}, and {axis} has {size}."
                )


def damaged(participant: "Participant", error: Exception) -> UserError:
    """Return the error of a state that cannot be read."""
    reason = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"it has no {error}"
    return UserError(f"The checkpoint's state of {participant.label} is damaged: {reason}.")
