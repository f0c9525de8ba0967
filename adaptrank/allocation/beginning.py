"""The beginning of a new run: ranks to start from, and whether they make sense."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adaptrank._errors import UserError
from adaptrank.allocation import checks
from adaptrank.allocation.context import Run
from adaptrank.allocation.events import Event
from adaptrank.allocation.trained_units import OwnStart, check_fresh, check_removed
from adaptrank.axes import generator

if TYPE_CHECKING:
    from adaptrank.allocation.participant import Choice, Participant


def begin(participant: "Participant", run: Run, own: OwnStart) -> None:
    """Choose the ranks to start from, resize the axes, and check that the run can act.

    Args:
        participant: allocator or rank initializer of a new run.
        run: the run that begins.
        own: start that the participant has set in a run which ended before its first step.
    Raises:
        ValueError: if an axis cannot have the chosen size, if trained units would be lost, or if
            the run makes no sense.
    """
    sizes_before = run.sizes()
    if participant.sets_tensors:
        check_fresh(participant, run.axes, own)
    choice = participant.choose(run.axes, run.batches)
    if choice is not None:
        check_removed(participant, run.axes, choice.ranks, own)
        _resize(participant, run, choice.ranks)
    run.note_start()
    if choice is not None:
        participant.initialize(run.axes, choice.evidence)
    participant.check_start(run.start_sizes)
    if choice is not None:
        run.record(_event_of(participant, run, choice, sizes_before))
    if participant.moves:
        checks.check_budget(participant, run)


def _resize(participant: "Participant", run: Run, ranks: Mapping[str, int]) -> None:
    for key, size in ranks.items():
        axis = run.axes[key]
        kept = min(size, len(axis))
        if size > kept and "grow" not in axis.capabilities:
            raise UserError(
                f"{participant.label} asks {key} for {size} units, it has {kept}, and those of "
                f"{type(axis.members[0][0]).__name__} cannot grow; start with {size} or more."
            )
        fresh = generator(participant.seed, key, 0)
        axis.resize(range(kept), size - kept, fresh, run.optimizers)


def _event_of(
    participant: "Participant", run: Run, choice: "Choice", sizes_before: Mapping[str, int]
) -> Event:
    grown: dict[str, int] = {}
    pruned: dict[str, list[int]] = {}
    for key, size in run.start_sizes.items():
        if size > sizes_before[key]:
            grown[key] = size - sizes_before[key]
        elif size < sizes_before[key]:
            pruned[key] = list(range(size, sizes_before[key]))
    event: Event = {
        "step": 0,
        "reason": f"ranks to start from, by {participant.title}",
        "unit": run.unit,
        "sizes": run.start_sizes,
        "grown": grown,
        "pruned": pruned,
    }
    event.update(choice.facts)
    return event
