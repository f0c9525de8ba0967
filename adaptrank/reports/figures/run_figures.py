"""Pictures of a run: its ranks, its budget and its scores."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptrank.reports.figures.drawing import (
    LABELLED_ROWS,
    MOST_WRITTEN_CELLS,
    Cells,
    TextStyle,
    draw_heat_map,
    empty_cells,
    new_figure,
)
from adaptrank.reports.history import SNAPSHOTS, Event, History
from adaptrank.reports.layer_grid import LayerGrid, layer_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

BLUE = "tab:blue"


def draw_run(history: History, folder: Path) -> dict[str, Path]:
    """Draw the pictures of a run into a folder.

    Returns:
        Name of a picture -> file. There is no picture of scores if no event recorded any.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    grid = layer_grid(list(history.start))
    figures = {
        "ranks": _rank_change_figure(history, grid),
        "over_time": _ranks_over_time_figure(history, grid),
        "budget": _budget_figure(history.events),
    }
    scored = [event for event in history.events if event.get("scores")]
    if scored:
        figures["scores"] = _scores_figure(scored)
    files: dict[str, Path] = {}
    for name, figure in figures.items():
        files[name] = folder / f"{name}.png"
        figure.savefig(files[name], dpi=110, bbox_inches="tight", facecolor="white")
    return files


def _rank_change_figure(history: History, grid: LayerGrid) -> "Figure":
    """Draw the ranks at the start, at the end, and their difference."""
    figure = new_figure(3.2 + 1.35 * len(grid.kinds), _height(grid))
    panels = figure.subplots(1, 3, sharey=True)
    first, last = _unit_cells(history.start, grid), _unit_cells(history.end, grid)
    change = last - first
    most_units = max(_largest(first), _largest(last))
    for panel, cells, title in zip(panels[:2], (first, last), ("start", "end"), strict=True):
        image = _draw_units(panel, cells, grid, title, most_units)
        _write_units(panel, cells, image)
    figure.colorbar(panels[0].images[0], ax=panels[:2], fraction=0.03, label="units")

    span = max(_largest(abs(change)), 1.0)
    image = _draw_map(panels[2], change, grid, "change", cmap="PuOr_r", vmin=-span, vmax=span)
    _write_changes(panels[2], change)
    figure.colorbar(image, ax=panels[2], fraction=0.06)
    panels[0].set_ylabel("layer")
    return figure


def _ranks_over_time_figure(history: History, grid: LayerGrid) -> "Figure":
    """Draw the ranks at a few steps, evenly spread over the events."""
    last_index = len(history.sizes) - 1
    indices = [round(i * last_index / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)]
    snapshots = dict(history.sizes[index] for index in indices)
    most_units = max(
        max(max(sizes.values()) for _, sizes in history.sizes),
        _largest(_unit_cells(history.start, grid)),
        _largest(_unit_cells(history.end, grid)),
    )
    figure = new_figure(1.2 + 1.5 * len(snapshots) + 0.1 * len(grid.kinds), _height(grid))
    panels = figure.subplots(1, len(snapshots), sharey=True, squeeze=False)[0]
    for panel, (step, sizes) in zip(panels, snapshots.items(), strict=True):
        image = _draw_units(panel, _unit_cells(sizes, grid), grid, f"step {step}", most_units)
    figure.colorbar(image, ax=panels, fraction=0.02, label="units")
    panels[0].set_ylabel("layer")
    return figure


def _budget_figure(events: Sequence[Event]) -> "Figure":
    """Draw allocated and open units and the budget over the steps."""
    figure = new_figure(7, 3.2)
    panel = figure.subplots()
    for name, line in (("allocated", ":"), ("active", "-"), ("budget", "--")):
        points = [(event["step"], event[name]) for event in events if _has_units(event, name)]
        if points:
            steps, units = zip(*points, strict=True)
            panel.step(steps, units, where="post", linestyle=line, marker=".", label=name)
    panel.set(xlabel="optimizer step", ylabel="units", ylim=(0, None), title="Budget")
    _add_legend_and_grid(panel)
    return figure


def _has_units(event: Event, name: str) -> bool:
    """Return whether an event states a number in units. A budget may be in parameters."""
    if "total" not in event or event.get(name) is None:
        return False
    return name != "budget" or event.get("unit", "ranks") == "ranks"


def _scores_figure(scored: Sequence[Event]) -> "Figure":
    """Draw the median of the scores at each event, and bands around it."""
    figure = new_figure(7, 3.2)
    panel = figure.subplots()
    steps = [event["step"] for event in scored]
    scores = [event["scores"] for event in scored]
    _draw_score_bands(panel, steps, scores)
    medians = [entry["median"] for entry in scores]
    panel.plot(steps, medians, color=BLUE, marker=".", label="median")
    if all(entry["min"] > 0 for entry in scores):
        panel.set_yscale("log")
    panel.set(xlabel="optimizer step", ylabel="score of a unit", title="Scores")
    _add_legend_and_grid(panel)
    return figure


def _draw_score_bands(
    panel: "Axes", steps: Sequence[int], scores: Sequence[Mapping[str, float]]
) -> None:
    """Draw the whole range of the scores, and the middle half of them, where events state them."""
    for low, high, opacity in (("min", "max", 0.18), ("q25", "q75", 0.4)):
        if all(low in entry and high in entry for entry in scores):
            panel.fill_between(
                steps,
                [entry[low] for entry in scores],
                [entry[high] for entry in scores],
                alpha=opacity,
                color=BLUE,
                label=f"{low} to {high}",
                linewidth=0,
            )


def _add_legend_and_grid(panel: "Axes") -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False)
    panel.grid(alpha=0.3)


def _height(grid: LayerGrid) -> float:
    """Return the height of a figure of ranks in inches."""
    return 1.6 + 0.22 * max(len(grid.layers), 6)


def _unit_cells(sizes: Mapping[str, int], grid: LayerGrid) -> Cells:
    """Return the number of units in each cell. Axes that share a cell add up."""
    cells = empty_cells(grid)
    for axis, size in sizes.items():
        if axis in grid.places:
            place = grid.places[axis]
            cells[place] = size if np.isnan(cells[place]) else cells[place] + size
    return cells


def _draw_map(
    panel: "Axes", cells: Cells, grid: LayerGrid, title: str, **colors: Any
) -> "AxesImage":
    return draw_heat_map(
        panel,
        cells,
        grid,
        title,
        TextStyle(title=10, labels=8, angle=45),
        row_step=max(1, len(grid.layers) // LABELLED_ROWS),
        interpolation="nearest",
        **colors,
    )


def _draw_units(
    panel: "Axes", cells: Cells, grid: LayerGrid, title: str, most_units: float
) -> "AxesImage":
    """Draw numbers of units on a color scale from zero to `most_units`."""
    return _draw_map(panel, cells, grid, title, cmap="viridis", vmin=0, vmax=float(most_units))


def _write_units(panel: "Axes", cells: Cells, image: "AxesImage") -> None:
    """Write the number of units into each cell: black on bright colors, white on dark ones."""
    low, high = image.get_clim()
    if cells.size > MOST_WRITTEN_CELLS:
        return
    for row, column, value in _known_cells(cells):
        brightness = (value - low) / max(high - low, 1e-9)
        color = "black" if brightness > 0.55 else "white"
        panel.text(column, row, f"{value:g}", ha="center", va="center", fontsize=6, color=color)


def _write_changes(panel: "Axes", change: Cells) -> None:
    """Write the change of units into each cell that changed."""
    if change.size > MOST_WRITTEN_CELLS:
        return
    for row, column, value in _known_cells(change):
        text = f"{value:+g}" if value else ""
        panel.text(column, row, text, ha="center", va="center", fontsize=6)


def _known_cells(cells: Cells) -> Iterator[tuple[int, int, float]]:
    """Yield (row, column, value) of each cell that has a value."""
    for row, column in np.argwhere(~np.isnan(cells)).tolist():
        yield row, column, float(cells[row, column])


def _largest(cells: Cells) -> float:
    """Return the largest value, or 0 if there is none."""
    return 0.0 if np.isnan(cells).all() else float(np.nanmax(cells))
