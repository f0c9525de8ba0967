"""Pictures of a study: the metric over what it costs, and the final ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank.reports.comparison import Row, pareto, row_label
from adaptrank.reports.escaping import in_picture
from adaptrank.reports.figures.drawing import (
    TextStyle,
    draw_heat_map,
    empty_cells,
    new_figure,
)
from adaptrank.reports.layer_grid import layer_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = {
    "num_trainable_params": ("trainable parameters", 1.0),
    "train_time": ("seconds of training", 1.0),
    "accelerator_memory_max": ("peak memory, GiB", 2.0**30),
}
"""Column of a row -> (label, size of the unit)."""

MARKERS = "osD^vP*Xhd<>"

MOST_RANK_MAPS = 12
"""Largest number of rows whose final ranks are shown."""


def draw_study(record: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Draw the pictures of a study into a folder.

    Args:
        record: results of the study.
        rows: rows of its table.
        folder: folder to write.

    Returns:
        Name of a picture -> file. There is none if no run succeeded, and none of the ranks where
        each row has one rank everywhere.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    figures: dict[str, Figure] = {}
    successful = [row for row in rows if "metric" in row]
    if successful:
        figures["pareto"] = _pareto_figure(record, successful)
    varied = [row for row in successful if len(set(row["ranks"].values())) > 1]
    if varied:
        figures["ranks"] = _ranks_figure(varied[:MOST_RANK_MAPS])
    files: dict[str, Path] = {}
    for name, figure in figures.items():
        files[name] = folder / f"{name}.png"
        figure.savefig(files[name], dpi=120)
    return files


def _pareto_figure(record: Mapping[str, Any], rows: Sequence[Row]) -> "Figure":
    """Draw the metric over parameters, time and memory."""
    figure = new_figure(13, 4.2, layout="constrained")
    panels = figure.subplots(1, len(COSTS))
    for panel, (cost, (label, _)) in zip(panels, COSTS.items(), strict=True):
        _draw_methods(panel, rows, cost)
        _draw_front(panel, rows, cost, record["mode"])
        if cost == "num_trainable_params":
            panel.set_xscale("log")
        panel.set(xlabel=label, ylabel=in_picture(record["metric"]))
        panel.grid(alpha=0.3)
    panels[-1].legend(frameon=False, fontsize=8)
    return figure


def _draw_methods(panel: "Axes", rows: Sequence[Row], cost: str) -> None:
    """Draw one series for each method with its allocator, joined by lines over the parameters."""
    unit = COSTS[cost][1]
    line = "-" if cost == "num_trainable_params" else ""
    for number, label in enumerate(dict.fromkeys(row_label(row) for row in rows)):
        series = [row for row in rows if row_label(row) == label]
        series.sort(key=lambda row: row[cost])
        panel.errorbar(
            [row[cost] / unit for row in series],
            [row["metric"] for row in series],
            [row["deviation"] or 0.0 for row in series],
            label=in_picture(label),
            fmt=MARKERS[number % len(MARKERS)] + line,
            ms=5,
            lw=1,
            capsize=2,
            color=f"C{number % 10}",
        )


def _draw_front(panel: "Axes", rows: Sequence[Row], cost: str, mode: str) -> None:
    """Draw a broad gray line through the Pareto front."""
    unit = COSTS[cost][1]
    front = pareto([(row[cost] / unit, row["metric"]) for row in rows], mode)
    costs, metrics = zip(*front, strict=True)
    panel.plot(costs, metrics, color="0.5", lw=4, alpha=0.3, zorder=0, label="best so far")


def _ranks_figure(rows: Sequence[Row]) -> "Figure":
    """Draw one heat map of the final ranks for each row."""
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = new_figure(3.4 * columns, 2.8 * lines, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, row in zip(panels, rows, strict=False):
        grid = layer_grid(list(row["ranks"]))
        cells = empty_cells(grid)
        for axis, size in row["ranks"].items():
            cells[grid.places[axis]] = size
        budget = "" if row["budget"] is None else f", {row['budget']:,}"
        title = f"{row_label(row)}{budget}"
        style = TextStyle(title=8, labels=6, angle=60)
        image = draw_heat_map(panel, cells, grid, title, style, cmap="viridis", vmin=0)
        figure.colorbar(image, ax=panel, shrink=0.8)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    return figure
