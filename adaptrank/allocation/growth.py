"""Parameters under a budget in ranks: units cost unequally, so their number does not hold them."""

from typing import TYPE_CHECKING

from adaptrank.axes import cost_model, rank_axes

if TYPE_CHECKING:
    from adaptrank.allocation.participant import Participant

ADVICE = "With `unit: parameters` they would not"


def parameter_growth(participant: "Participant") -> str:
    """Return one sentence if parameters grew since the start of a run, "" if they did not.

    Only a budget in ranks lets them grow.
    """
    run = participant.run
    if not participant.moves or run.unit != "ranks" or not run.start_sizes:
        return ""
    cost = cost_model(run.model)
    sizes = {key: len(axis) for key, axis in rank_axes(run.model).items()}
    before, now = cost.total({**sizes, **run.start_sizes}), cost.total(sizes)
    if now <= before:
        return ""
    units = sum(run.sizes().values())
    return (
        f"{participant.title} ends with {units:,} units of {sum(run.start_sizes.values()):,}, and "
        f"the parameters of the adapters grew from {before:,} to {now:,} "
        f"({now / before - 1:+.1%}), since its budget counts ranks. {ADVICE}."
    )


def possible_growth(participant: "Participant") -> str:
    """Return one sentence if parameters may grow in a run that was foreseen, "" if they may not.

    It has an upper bound: all units that the budget allows on the axes whose units cost most. It is
    "" where the cost of a unit depends on other axes.
    """
    run = participant.run
    budget = participant.budget_at(run.phases.end) if participant.moves else None
    if budget is None or run.unit != "ranks" or "grow" not in participant.requires:
        return ""
    cost = cost_model(run.model)
    if any(len(axes) > 1 for _, axes in cost.terms):
        return ""
    sizes = {key: len(axis) for key, axis in rank_axes(run.model).items()}
    start = cost.total(sizes)
    most = cost.total(_costliest_sizes(participant, sizes, budget))
    if most <= start:
        return ""
    return (
        f"The budget counts ranks: the parameters of the adapters may grow from {start:,} to at "
        f"most {most:,}. {ADVICE}."
    )


def _costliest_sizes(
    participant: "Participant", start: dict[str, int], budget: int
) -> dict[str, int]:
    """Return the sizes within floors and caps that cost most, with as many units as the budget."""
    run, caps, floors = participant.run, participant.caps(), participant.floors()
    cost = cost_model(run.model)
    sizes = dict(start)
    for key in run.axes:
        floor = floors if isinstance(floors, int) else floors[key]
        sizes[key] = min(start[key], floor)
    left = budget - sum(sizes[key] for key in run.axes)
    for key in sorted(run.axes, key=lambda key: -cost.marginal(key, sizes)):
        cap = caps[key]
        room = left if cap is None else max(cap, start[key]) - sizes[key]
        added = max(0, min(left, room))
        sizes[key] += added
        left -= added
    return sizes
