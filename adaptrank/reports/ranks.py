"""The report of a run: what its allocator did, as pictures and one page of HTML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrank._files import atomic_files
from adaptrank.reports.figures import draw_run
from adaptrank.reports.history import Event, History
from adaptrank.reports.layer_grid import layer_grid
from adaptrank.reports.rendering import Picture, render
from adaptrank.reports.round_table import round_rows
from adaptrank.reports.run_words import DESCRIPTIONS, captions, headline
from adaptrank.reports.tasks import task_rows

MOST_ROWS = 500
"""Largest number of rows of a table. A model may have 20,000 axes, and a run as many events."""
LONGEST_TEXT = 400
"""Characters of a text in a cell."""


def write_report(history: History, out: Path, replay: str) -> list[Path]:
    """Draw the pictures and write the page into a folder, each file as a whole.

    Args:
        history: history of the run.
        out: folder to write, made if need be.
        replay: command that trains with the final ranks from the first step.

    Returns:
        The files, the page last.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    with atomic_files(out) as temporary:
        pictures = draw_run(history, temporary)
        contents = {name: file.read_bytes() for name, file in pictures.items()}
        text = page(history, contents, replay)
        (temporary / "index.html").write_text(text, encoding="utf-8")
    names = [file.name for file in pictures.values()]
    return [out / name for name in [*names, "index.html"]]


def page(history: History, pictures: Mapping[str, bytes], replay: str) -> str:
    """Return the report as one HTML document, with the pictures inside."""
    axes = _axis_rows(history)
    events = history.events
    shown = captions(history)
    return render(
        "run.html.j2",
        title=_title(history),
        facts=[(name, value) for name, value in _facts(history) if value],
        headline=headline(history),
        pictures=[Picture(DESCRIPTIONS[name], png, shown[name]) for name, png in pictures.items()],
        replay=replay,
        **_task_rows(history),
        rounds=round_rows(history.rounds[-MOST_ROWS:]),
        events=[_event_row(event) for event in events[-MOST_ROWS:]],
        has_parameters=any("parameters" in event for event in events),
        events_left_out=max(0, len(events) - MOST_ROWS),
        kinds=_kind_rows(axes) if len(axes) > MOST_ROWS else [],
        axes=_most_changed(axes),
        axes_left_out=max(0, len(axes) - MOST_ROWS),
    )


def _task_rows(history: History) -> Mapping[str, Any]:
    """Return the rows of the tables of tasks, empty for a run without tasks."""
    return {"figures": [], "tasks": []} if history.tasks is None else task_rows(history.tasks)


def _title(history: History) -> str:
    names = ", ".join(history.allocators)[:LONGEST_TEXT]
    return f"Ranks of {history.name}, {names}" if names else f"Ranks of {history.name}"


def _axis_rows(history: History) -> list[dict[str, Any]]:
    """Return name, units at the start and units at the end of each axis."""
    rows = []
    for axis in {**history.start, **history.end}:
        end = history.end.get(axis, history.start.get(axis, 0))
        rows.append({"name": axis, "start": history.start.get(axis, 0), "end": end})
    return rows


def _most_changed(axes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return as many axes as a table shows: all, or those that changed most, in their order."""
    if len(axes) <= MOST_ROWS:
        return axes
    order = sorted(range(len(axes)), key=lambda i: -abs(axes[i]["end"] - axes[i]["start"]))
    return [axes[i] for i in sorted(order[:MOST_ROWS])]


def _kind_rows(axes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sums over the axes of each kind of layer, the largest changes first."""
    grid = layer_grid([axis["name"] for axis in axes])
    rows: dict[str, dict[str, Any]] = {}
    for axis in axes:
        kind = grid.kinds[grid.places[axis["name"]][1]]
        row = rows.setdefault(kind, {"name": kind, "axes": 0, "start": 0, "end": 0})
        row["axes"] += 1
        row["start"] += axis["start"]
        row["end"] += axis["end"]
    ordered = sorted(rows.values(), key=lambda row: -abs(row["end"] - row["start"]))
    return ordered[:MOST_ROWS]


def _facts(history: History) -> list[tuple[str, str]]:
    """Return (name, value) of the lines at the top of the page."""
    facts = _facts_of_summary(history.summary) if history.summary else []
    units_at_start, units_at_end = sum(history.start.values()), sum(history.end.values())
    facts.append(("units", f"{units_at_start:,} to {units_at_end:,} on {len(history.end)} axes"))
    parameters = [event["parameters"] for event in history.events if "parameters" in event]
    if history.events and "parameters" in history.events[0]:
        facts.append(("parameters of the adapters", f"{parameters[0]:,} to {parameters[-1]:,}"))
    facts.append(("events", str(sum(event["step"] != 0 for event in history.events))))
    return facts


def _facts_of_summary(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    methods = dict.fromkeys(row["method"] for row in summary.get("layers", []))
    facts = [
        ("base", str(summary.get("base", {}).get("name", ""))[:LONGEST_TEXT]),
        ("method", ", ".join(methods)[:LONGEST_TEXT]),
        ("trainable parameters", f"{summary.get('trainable', 0):,}"),
    ]
    before, after = summary.get("before", {}), summary.get("after", {})
    for name in list(before)[:MOST_ROWS]:
        if before[name] is not None and after.get(name) is not None:
            facts.append((name, f"{before[name]:.4g} to {after[name]:.4g}"))
    return facts


def _event_row(event: Event) -> dict[str, Any]:
    """Return the cells of an event in the table of events."""
    return {
        "step": event["step"],
        "pruned": _unit_count(event.get("pruned")),
        "closed": _unit_count(event.get("closed")),
        "grown": _unit_count(event.get("grown")),
        "total": event.get("total", ""),
        "parameters": event.get("parameters", ""),
        "reason": str(event.get("reason", event.get("skipped", "")))[:LONGEST_TEXT],
    }


def _unit_count(moved: Mapping[str, Any] | None) -> int:
    """Return the number of units in {axis: units} or {axis: number of units}."""
    return sum(
        len(units) if isinstance(units, list) else int(units) for units in (moved or {}).values()
    )
