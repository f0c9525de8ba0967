"""Pictures of a run: its ranks, its budget and its scores."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adaptrank.reports.figures.drawing import (
    CHANGE_COLORS,
    NORMAL,
    SMALL,
    UNITS_COLORS,
    Cells,
    add_color_bar,
    draw_heat_map,
    empty_cells,
    largest,
    map_size,
    new_figure,
    save,
    write_numbers,
)
from adaptrank.reports.figures.task_figures import task_figure
from adaptrank.reports.history import Event, History
from adaptrank.reports.layer_grid import LayerGrid, layer_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "tab:blue"

MOST_WRITTEN_CELLS = 700
"""Number of cells up to which a map has the numbers written into them."""

WIDEST = 10.0
"""Width in inches up to which maps stand side by side."""


def draw_run(history: History, folder: Path) -> dict[str, Path]:
    """Draw the pictures of a run into a folder.

    Returns:
        Name of a picture -> file. There is no picture of the ranks over time if none moved, none of
        scores if no event recorded any, and none of tasks without tasks.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    grid = layer_grid(list(history.start))
    figures = {"ranks": _rank_change_figure(history, grid)}
    if any(sizes != history.start for _, sizes in history.sizes):
        figures["over_time"] = _ranks_over_time_figure(history, grid)
    figures["budget"] = _budget_figure(history)
    scored = [event for event in history.events if event.get("scores")]
    if scored:
        figures["scores"] = _scores_figure(scored)
    if history.tasks is not None:
        figures["tasks"] = task_figure(history.tasks)
    files: dict[str, Path] = {}
    for name, figure in figures.items():
        files[name] = folder / f"{name}.png"
        save(figure, files[name])
    return files


def _rank_change_figure(history: History, grid: LayerGrid) -> "Figure":
    """Draw the units at the end and their change. Units at the start are drawn if they differ."""
    first, last = _unit_cells(history.start, grid), _unit_cells(history.end, grid)
    change = last - first
    most_units = max(largest(first), largest(last), 1.0)
    units = {f"units at the end{_uniform(last)}": last}
    if _uniform(first):
        start = f"change since the start{_uniform(first)}"
    else:
        units = {"units at the start": first, **units}
        start = "change since the start"
    width, height = map_size(grid, 0.42, 0.22 if len(grid.layers) <= 40 else 0.16)
    panels_count = len(units) + bool(np.nan_to_num(change).any())
    down = panels_count > 1 and panels_count * width > WIDEST
    rows, columns = (panels_count, 1) if down else (1, panels_count)
    figure = new_figure(max(columns * width + 0.6, 4.5), rows * height)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    is_written = first.size <= MOST_WRITTEN_CELLS
    for panel, (title, cells) in zip(panels, units.items(), strict=False):
        image = draw_heat_map(panel, cells, grid, title, UNITS_COLORS, 0, most_units)
        if is_written and not _uniform(cells):
            write_numbers(panel, cells, image, "g")
        add_color_bar(figure, panel, "" if is_written else "units")
    if panels_count > len(units):
        span = largest(abs(change))
        image = draw_heat_map(panels[-1], change, grid, start, CHANGE_COLORS, -span, span)
        if is_written:
            write_numbers(panels[-1], np.where(change == 0, np.nan, change), image, "+g")
        add_color_bar(figure, panels[-1], "" if is_written else "change")
    _label_layers(panels)
    return figure


def _ranks_over_time_figure(history: History, grid: LayerGrid) -> "Figure":
    """Draw the units at a few steps, evenly spread over the events."""
    snapshots = dict(history.sizes)
    all_cells = {step: _unit_cells(sizes, grid) for step, sizes in snapshots.items()}
    most_units = max(1.0, *map(largest, all_cells.values()))
    width, height = map_size(grid, 0.24, 0.17 if len(grid.layers) <= 12 else 0.1)
    columns = max(1, min(len(snapshots), int(WIDEST / width), 3))
    rows = -(-len(snapshots) // columns)
    figure = new_figure(max(columns * width + 0.8, 4.5), rows * height)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel, (step, cells) in zip(panels.flatten(), all_cells.items(), strict=False):
        title = f"step {step}: {np.nansum(cells):,.0f} units"
        draw_heat_map(panel, cells, grid, title, UNITS_COLORS, 0, most_units)
        panel.tick_params(axis="x", rotation=90)
        panel.set_xticks(panel.get_xticks(), panel.get_xticklabels(), ha="center")
    for panel in panels.flatten()[len(snapshots) :]:
        panel.set_axis_off()
    add_color_bar(figure, panels[0, 0], "units", list(panels.flatten()))
    _label_layers(panels[:, 0])
    return figure


def _budget_figure(history: History) -> "Figure":
    """Draw allocated and open units and the budget, from step 0 to the end of the training."""
    figure = new_figure(5.2, 2.8)
    panel = figure.subplots()
    start = float(sum(history.start.values()))
    end = max([*(event["step"] for event in history.events), history.summary.get("steps", 0)])
    series = {name: _series(history.events, name) for name in ("allocated", "active", "budget")}
    if series["allocated"] == series["active"]:
        del series["allocated"]
    names = {"allocated": "allocated units", "active": "units in use", "budget": "budget"}
    for name, points in series.items():
        if not points:
            continue
        if name != "budget" and points[0][0] > 0:
            points = [(0, start), *points]
        points = [*points, (end, points[-1][1])]
        steps, units = zip(*points, strict=True)
        line, color = {"allocated": (":", "tab:gray"), "budget": ("--", "tab:orange")}.get(
            name, ("-", BLUE)
        )
        panel.step(steps, units, where="post", linestyle=line, color=color, label=names[name])
    panel.set(xlabel="optimizer step", ylabel="units", ylim=(0, None))
    _finish_curves(panel, end)
    return figure


def _series(events: Sequence[Event], name: str) -> list[tuple[int, float]]:
    """Return (step, units) of the events that state a number in units."""
    return [(event["step"], event[name]) for event in events if _has_units(event, name)]


def _has_units(event: Event, name: str) -> bool:
    """Return whether an event states a number in units. A budget may be in parameters."""
    if "total" not in event or event.get(name) is None:
        return False
    return name != "budget" or event.get("unit", "ranks") == "ranks"


def _scores_figure(scored: Sequence[Event]) -> "Figure":
    """Draw the median of the scores at each event, and bands around it."""
    figure = new_figure(5.2, 2.8)
    panel = figure.subplots()
    steps = [event["step"] for event in scored]
    scores = [event["scores"] for event in scored]
    _draw_score_bands(panel, steps, scores)
    medians = [entry["median"] for entry in scores]
    panel.plot(steps, medians, color=BLUE, marker=".", label="median")
    if all(entry["min"] > 0 for entry in scores):
        panel.set_yscale("log")
    panel.set(xlabel="optimizer step", ylabel="score of a unit")
    _finish_curves(panel, steps[-1])
    return figure


def _draw_score_bands(
    panel: "Axes", steps: Sequence[int], scores: Sequence[Mapping[str, float]]
) -> None:
    """Draw the whole range of the scores, and the middle half of them, where events state them."""
    bands = (("min", "max", 0.18, "all"), ("q25", "q75", 0.4, "middle half"))
    for low, high, opacity, name in bands:
        if all(low in entry and high in entry for entry in scores):
            panel.fill_between(
                steps,
                [entry[low] for entry in scores],
                [entry[high] for entry in scores],
                alpha=opacity,
                color=BLUE,
                label=name,
                linewidth=0,
            )


def _finish_curves(panel: "Axes", last_step: float) -> None:
    """Start the steps at 0, mark whole steps, and put the legend above the curves."""
    from matplotlib.ticker import MaxNLocator

    panel.set_xlim(0, max(last_step, 1) * 1.02)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.get_legend_handles_labels()[0]:
        panel.legend(
            frameon=False, fontsize=SMALL, ncols=3, loc="lower left", bbox_to_anchor=(0, 1)
        )
    panel.grid(alpha=0.3)


def _label_layers(panels: "Iterable[Axes]") -> None:
    for panel in panels:
        panel.set_ylabel("layer", fontsize=NORMAL)


def _uniform(cells: Cells) -> str:
    """Return ": N everywhere" if all cells with a value have the same, or nothing."""
    known = cells[~np.isnan(cells)]
    if known.size and (known == known[0]).all():
        return f": {known[0]:g} everywhere"
    return ""


def _unit_cells(sizes: Mapping[str, int], grid: LayerGrid) -> Cells:
    """Return the number of units in each cell. Axes that share a cell add up."""
    cells = empty_cells(grid)
    for axis, size in sizes.items():
        if axis in grid.places:
            place = grid.places[axis]
            cells[place] = size if np.isnan(cells[place]) else cells[place] + size
    return cells
