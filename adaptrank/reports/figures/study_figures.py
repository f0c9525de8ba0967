"""Pictures of a study: the metric over what it costs, learning rates, and the final ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank.reports.comparison import Row, pareto, row_label, setting_label
from adaptrank.reports.escaping import in_picture
from adaptrank.reports.figures.drawing import (
    SMALL,
    UNITS_COLORS,
    add_color_bar,
    draw_heat_map,
    empty_cells,
    largest,
    map_size,
    new_figure,
    save,
)
from adaptrank.reports.layer_grid import layer_grid
from adaptrank.reports.trial_table import means_by_rate

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
        Name of a picture -> file. There is none if no run succeeded, none of learning rates where
        none was selected, and none of the ranks where each row has one rank everywhere.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    figures: dict[str, Figure] = {}
    successful = [row for row in rows if "metric" in row]
    if successful:
        figures["pareto"] = _pareto_figure(record, successful)
    curves = means_by_rate(record)
    if curves:
        figures["learning_rates"] = _rates_figure(record, rows, curves)
    varied = [row for row in successful if len(set(row["ranks"].values())) > 1]
    if varied:
        figures["ranks"] = _ranks_figure(varied[:MOST_RANK_MAPS])
    files: dict[str, Path] = {}
    for name, figure in figures.items():
        files[name] = folder / f"{name}.png"
        save(figure, files[name])
    return files


def _pareto_figure(record: Mapping[str, Any], rows: Sequence[Row]) -> "Figure":
    """Draw the metric over parameters, time and memory."""
    from matplotlib.ticker import MaxNLocator

    labels = len({row_label(row) for row in rows})
    figure = new_figure(10.5, 3.4 + 0.2 * -(-labels // 3))
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for panel, (cost, (label, _)) in zip(panels, COSTS.items(), strict=True):
        _draw_methods(panel, rows, cost)
        _draw_front(panel, rows, cost, record["mode"])
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if cost == "num_trainable_params":
            _set_number_axis(panel, [row[cost] for row in rows])
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(in_picture(record["metric"]))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL
    )
    return figure


def _set_number_axis(panel: "Axes", numbers: Sequence[float]) -> None:
    """Make an axis of whole numbers logarithmic, with ticks such as 20k and 1M."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    low, high = max(min(numbers), 1), max(*numbers, 1)
    panel.set_xscale("log")
    panel.set_xlim(low / 1.3, high * 1.3)
    within = high / low < 30
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if within else (1,), numticks=12))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _rates_figure(
    record: Mapping[str, Any], rows: Sequence[Row], curves: Mapping[str, Mapping[float, float]]
) -> "Figure":
    """Draw the selected metric over the learning rate, and mark the chosen rates."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    chosen = {setting_label(row): row["lr"] for row in rows}
    figure = new_figure(7, 3.2 + 0.2 * -(-len(curves) // 3))
    panel = figure.subplots()
    for number, (label, curve) in enumerate(curves.items()):
        color, marker = f"C{number % 10}", MARKERS[number % len(MARKERS)]
        panel.plot(
            *zip(*curve.items(), strict=True),
            f"{marker}-",
            color=color,
            ms=5,
            label=in_picture(label),
        )
        if chosen.get(label) in curve:
            rate = chosen[label]
            panel.plot(rate, curve[rate], "o", ms=13, mfc="none", color=color)
    panel.set_xscale("log")
    rates = sorted({rate for curve in curves.values() for rate in curve})
    panel.xaxis.set_major_locator(FixedLocator(rates[:: -(-len(rates) // 8)]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    panel.set(xlabel="learning rate (circle: chosen)", ylabel=in_picture(record["selected_by"]))
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL)
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
    """Draw one heat map of the final ranks for each row, all with the same colors."""
    grids = [layer_grid(list(row["ranks"])) for row in rows]
    sizes = [map_size(grid, 0.26, 0.1 if len(grid.layers) > 8 else 0.2) for grid in grids]
    width, height = (max(each) for each in zip(*sizes, strict=True))
    columns = max(1, min(len(rows), 3, int(10 / width)))
    lines = -(-len(rows) // columns)
    figure = new_figure(columns * max(width, 2.6) + 0.8, lines * height)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    most_units = max(max(row["ranks"].values()) for row in rows)
    for panel, row, grid in zip(panels, rows, grids, strict=False):
        cells = empty_cells(grid)
        for axis, size in row["ranks"].items():
            cells[grid.places[axis]] = size
        high = max(float(most_units), largest(cells), 1.0)
        title = setting_label(row)
        draw_heat_map(panel, cells, grid, title, UNITS_COLORS, 0, high)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    add_color_bar(figure, panels[0], "units", list(panels[: len(rows)]))
    return figure
