"""The history of a run: what an allocator did, read from the files of the run's folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.reports.records import (
    COUNTS,
    EVENT,
    SUMMARY,
    check_fields,
    is_count,
    read_lines,
    read_table,
)
from adaptrank.reports.round_table import Round, events_of_rounds, read_rounds
from adaptrank.reports.task_history import TaskHistory, read_tasks

Event = dict[str, Any]
"""One line of ranks.jsonl."""

Sizes = dict[str, int]
"""Axis -> number of its open units."""

SNAPSHOTS = 6
"""Largest number of steps at which the sizes of all axes are kept."""


@dataclass(frozen=True)
class History:
    """A run as its folder has it.

    Args:
        name: name of the run.
        events: lines of ranks.jsonl, by step.
        sizes: (step, sizes) at the start, after the last event, and after a few events between
            that are evenly spread. `SNAPSHOTS` in all at most.
        summary: figures of the run, empty if the run did not end.
        rounds: lines of rounds.jsonl, empty without a training strategy.
        tasks: accuracy matrix of the run, if its classes arrived in tasks.
    """

    name: str
    events: list[Event]
    sizes: list[tuple[int, Sizes]]
    summary: dict[str, Any]
    rounds: list[Round] = field(default_factory=list)
    tasks: TaskHistory | None = None

    @property
    def allocators(self) -> list[str]:
        """Names of the allocators, with their variants. Runs of earlier versions have none."""
        named: list[str] = self.events[0].get("allocators", []) if self.events else []
        return named

    @property
    def start(self) -> Sizes:
        """Sizes at the start."""
        return self.sizes[0][1]

    @property
    def end(self) -> Sizes:
        """Sizes after the last event."""
        return self.sizes[-1][1]


def read_history(folder: Path) -> History:
    """Read the history of a run from its folder.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing moved or started anew in it.
        UserError: if a file is damaged, naming the line and the key. The last line of ranks.jsonl
            may be cut off, as a killed run leaves it. Such a line is left out.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder. Name the folder of a run, such as runs/NAME/0."
        )
    file, rounds = folder / "ranks.jsonl", read_rounds(folder)
    if not file.is_file() and not any(record["ranks"] for record in rounds):
        raise FileNotFoundError(
            f"{folder} holds no ranks.jsonl: no allocator moved a rank in this run."
        )
    events = _read_events(file) if file.is_file() else events_of_rounds(rounds)
    sizes = _sizes_after_events(events, _read_ranks(folder / "ranks.json"))
    if not sizes:
        raise UserError(
            f"{file} says nowhere what sizes the axes had. The file is damaged, or of an older "
            "version."
        )
    name = "/".join(folder.resolve().parts[-2:])
    summary = read_table(folder / "summary.json")
    check_fields(str(folder / "summary.json"), summary, SUMMARY)
    return History(name, events, sizes, summary, rounds, read_tasks(folder))


def history_of_events(
    events: Sequence[Mapping[str, Any]], start: Mapping[str, int], name: str, title: str
) -> History:
    """Return the history that the events of an allocator tell, without the files of a run.

    Args:
        events: its attribute `events`.
        start: sizes of the axes at the start.
        name: name of the run.
        title: name of the allocator.

    Raises:
        UserError: if there is no event.
    """
    total = sum(start.values())
    first: Event = {"step": 0, "reason": "the start", "allocators": [title], "sizes": dict(start)}
    moving = [dict(event) for event in events if event["step"] != 0]
    listed = [first | {"active": total, "allocated": total}]
    listed += sorted(moving, key=lambda event: int(event["step"]))
    sizes = _sizes_after_events(listed, {})
    if not sizes or not events:
        raise UserError(f"{title} has no events yet. Train with it first.")
    return History(name, listed, sizes, {})


def _read_events(file: Path) -> list[Event]:
    """Return the events of a file by step, without a last line that was cut off."""
    events: list[Event] = []
    for place, event in read_lines(file):
        check_fields(place, event, {"step": (is_count, "a whole number from 0 on")}, required=True)
        check_fields(place, event, EVENT)
        events.append(event)
    return sorted(events, key=lambda event: int(event["step"]))


def _read_ranks(file: Path) -> Sizes:
    """Return the final sizes in a ranks.json, empty if there is no file."""
    ranks = read_table(file)
    check_fields(str(file), {"ranks": ranks}, {"ranks": COUNTS})
    return ranks


def _sizes_after_events(
    events: Sequence[Event], final: Mapping[str, int]
) -> list[tuple[int, Sizes]]:
    """Return (step, sizes) at the start and after some events, or [] if no size is known."""
    sizes = _sizes_at_start(events, final)
    if not sizes:
        return []
    moving = [event for event in events if event["step"] != 0]
    kept = {round(i * len(moving) / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)}
    history = [(0, dict(sizes))]
    for number, event in enumerate(moving, 1):
        sizes.update(event.get("sizes", {}))
        if number in kept:
            closed = event.get("closed", {})
            open_units = {
                axis: max(0, size - len(closed.get(axis, []))) for axis, size in sizes.items()
            }
            history.append((int(event["step"]), open_units))
    return history


def _sizes_at_start(events: Sequence[Event], final: Mapping[str, int]) -> Sizes:
    """Return the sizes of all axes at the start.

    The event of step 0 states them. Axes that it leaves out are counted backwards from the final
    sizes, by the units that each event pruned and grew.
    """
    sizes: Sizes = {}
    if events and events[0]["step"] == 0:
        sizes = dict(events[0].get("sizes", {}))
    if not set(final) - set(sizes):
        return sizes
    sizes = {**final, **sizes}
    for event in reversed(events):
        for axis, units in event.get("pruned", {}).items():
            sizes[axis] = sizes.get(axis, 0) + len(units)
        for axis, count in event.get("grown", {}).items():
            sizes[axis] = max(0, sizes.get(axis, 0) - count)
    return sizes
