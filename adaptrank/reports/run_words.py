"""Sentences about the result of a run, and about its pictures."""

from collections.abc import Mapping

from adaptrank.reports.history import History
from adaptrank.reports.layer_grid import layer_grid
from adaptrank.reports.tasks import CAPTION as TASKS_CAPTION
from adaptrank.reports.tasks import DESCRIPTION as TASKS_DESCRIPTION

DESCRIPTIONS = {
    "ranks": "Heat maps of the units of each layer and kind at the end, and of their change",
    "over_time": "Heat maps of the units at several steps",
    "budget": "Units in use, allocated and budgeted over the optimizer steps",
    "scores": "Distribution of the scores at each event",
    "tasks": TASKS_DESCRIPTION,
}
"""Name of a picture -> its description for people who cannot see it."""

MOST_METRICS = 4
"""Largest number of metrics in the headline."""


def headline(history: History) -> list[str]:
    """Return up to three sentences: what moved, what it cost, and what it gave."""
    sentences = [_moved(history)]
    summary = history.summary
    if summary.get("parameters"):
        trainable, parameters = summary.get("trainable", 0), summary["parameters"]
        cost = (
            f"{trainable:,} of {parameters:,} parameters are trained ({trainable / parameters:.2%})"
        )
        if summary.get("steps") and summary.get("seconds"):
            minutes, seconds = divmod(round(summary["seconds"]), 60)
            cost += f", in {summary['steps']:,} steps and {minutes}:{seconds:02d} minutes"
        sentences.append(f"{cost}.")
    gains = _gains(summary.get("before", {}), summary.get("after", {}))
    if gains:
        sentences.append(f"From before to after the training, {' and '.join(gains)}.")
    return sentences


def captions(history: History) -> dict[str, str]:
    """Return name of a picture -> what to see in it."""
    last_step = history.sizes[-1][0]
    budget = "The units that are in use after each event."
    if any(event.get("budget") is not None for event in history.events):
        budget += " The allocator keeps them at or below its budget."
    return {
        "ranks": "A row is a layer of the model, and a darker cell has more units. "
        f"{_kept(history)}",
        "over_time": "The same cells from step 0 to the last event, "
        f"at step {last_step}, all with the same colors.",
        "budget": budget,
        "scores": "The allocator compares the scores of one event with each other. Their level "
        "depends on the method.",
        "tasks": TASKS_CAPTION,
    }


def _moved(history: History) -> str:
    """Return what happened to the units, in one sentence."""
    who = " and ".join(history.allocators) or "The allocator"
    start, end = history.start, history.end
    change = {axis: end.get(axis, 0) - size for axis, size in start.items()}
    lost = -sum(min(units, 0) for units in change.values())
    gained = sum(max(units, 0) for units in change.values())
    total = sum(start.values())
    if not lost and not gained:
        return f"No rank moved: {who} left the {total:,} units where they were."
    parts = []
    if lost:
        axes = sum(units < 0 for units in change.values())
        parts.append(f"took {lost:,} of {total:,} units from {axes} of {len(start)} axes")
    if gained:
        axes = sum(units > 0 for units in change.values())
        parts.append(f"gave {gained:,} to {axes} axes")
    empty = sum(start[axis] > 0 and not end.get(axis, 0) for axis in start)
    rest = f", and {empty} axes have none left" if empty else ""
    return f"{who} {' and '.join(parts)}{rest}."


def _gains(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> list[str]:
    """Return what became of the metrics that are known before and after."""
    gains: list[str] = []
    for name, old in before.items():
        new = after.get(name)
        if old is None or new is None or len(gains) == MOST_METRICS:
            continue
        verb = "stayed at" if new == old else "fell from" if new < old else "rose from"
        values = f"{old:.4g}" if new == old else f"{old:.4g} to {new:.4g}"
        gains.append(f"{name[:40]} {verb} {values}")
    return gains


def _kept(history: History) -> str:
    """Return which kinds of layers kept most and least of their units, if they differ."""
    grid = layer_grid(list(history.start))
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    for axis, size in history.start.items():
        kind = grid.kinds[grid.places[axis][1]]
        start[kind] = start.get(kind, 0) + size
        end[kind] = end.get(kind, 0) + history.end.get(axis, 0)
    shares = {kind: end[kind] / units for kind, units in start.items() if units}
    if len(shares) < 2 or max(shares.values()) == min(shares.values()):
        return ""
    most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    return (
        f"Of its units at the start, {most[:40]} has {shares[most]:.0%} at the end, "
        f"the largest share, and {least[:40]} has {shares[least]:.0%}, the smallest."
    )
