"""Figures of matplotlib, and one heat map: one row a layer, one column a kind of layer."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adaptrank.reports.escaping import in_picture
from adaptrank.reports.layer_grid import LayerGrid
from adaptrank.reports.rendering import DOTS_PER_INCH

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Cells = NDArray[np.float64]
"""Values of a grid (layers, kinds), NaN where there is none."""

LABELLED_ROWS = 16
"""Number of rows up to which every row has a label."""
LABELLED_COLUMNS = 40
"""Number of columns up to which every column has a label."""
LONGEST_LABEL, LONGEST_TITLE = 24, 80
"""Characters of a label and of a title. Pictures would otherwise grow with the names in a file."""
LARGEST_FIGURE = 20.0
"""Largest width and height of a figure in inches."""
SHORT_LABEL = 6
"""Characters up to which the labels of the columns stand upright."""

SMALL, NORMAL = 8, 9
"""Sizes of texts in points: labels and numbers, and titles."""

UNITS_COLORS, CHANGE_COLORS = "YlGnBu", "PuOr_r"
"""Color maps: light to dark from zero on, and two colors on both sides of zero."""


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures need matplotlib: pip install 'adaptrank[report]'."
        ) from error
    size = (min(width, LARGEST_FIGURE), min(height, LARGEST_FIGURE))
    return Figure(figsize=size, layout="constrained")


def save(figure: "Figure", file: "Path") -> None:
    """Write a figure as a PNG."""
    figure.savefig(file, dpi=DOTS_PER_INCH, facecolor="white")


def draw_heat_map(
    panel: "Axes", cells: Cells, grid: LayerGrid, title: str, colors: str, low: float, high: float
) -> "AxesImage":
    """Draw one heat map.

    Args:
        panel: panel of a figure to draw in.
        cells: values (layers, kinds).
        grid: names of the rows and the columns.
        title: title of the panel.
        colors: name of a color map of matplotlib.
        low: value of the first color.
        high: value of the last color.
    """
    image = panel.imshow(
        cells, aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest"
    )
    panel.set_title(label(title, LONGEST_TITLE), fontsize=NORMAL)
    names = short_names(grid.kinds)
    is_short = max(map(len, names), default=0) <= SHORT_LABEL
    columns = range(0, len(names), -(-len(names) // LABELLED_COLUMNS) or 1)
    panel.set_xticks(
        columns,
        [label(names[column]) for column in columns],
        rotation=0 if is_short else 45,
        ha="center" if is_short else "right",
        rotation_mode="anchor" if not is_short else "default",
        fontsize=SMALL,
    )
    rows = range(0, len(grid.layers), -(-len(grid.layers) // LABELLED_ROWS) or 1)
    panel.set_yticks(rows, [label(grid.layers[row]) for row in rows], fontsize=SMALL)
    panel.tick_params(length=0)
    return image


def write_numbers(panel: "Axes", cells: Cells, image: "AxesImage", form: str) -> None:
    """Write the value of each cell into it, black on light colors and white on dark ones.

    Args:
        panel: panel that has the heat map.
        cells: values (layers, kinds). NaN leaves a cell empty.
        image: the heat map.
        form: format of a number, as in `format`.
    """
    for row, column, value in _known_cells(cells):
        color = "black" if _luminance(image, value) > 0.5 else "white"
        text = format(value, form)
        panel.text(column, row, text, ha="center", va="center", fontsize=SMALL - 1, color=color)


def short_names(kinds: Sequence[str]) -> list[str]:
    """Return kinds without an ending that all of them have, as in q, k and v for q_proj, ..."""
    ending = "_proj"
    if len(kinds) > 1 and all(kind.endswith(ending) and kind != ending for kind in kinds):
        return [kind.removesuffix(ending) for kind in kinds]
    return list(kinds)


def label(text: str, longest: int = LONGEST_LABEL) -> str:
    """Return a text of a file as a label: not too long, and without formulas."""
    short = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return in_picture(short)


def empty_cells(grid: LayerGrid) -> Cells:
    """Return cells of a grid without a value."""
    return np.full((len(grid.layers), len(grid.kinds)), np.nan)


def largest(cells: Cells) -> float:
    """Return the largest value, or 0 if there is none."""
    return 0.0 if np.isnan(cells).all() else float(np.nanmax(cells))


def map_size(grid: LayerGrid, cell_width: float, cell_height: float) -> tuple[float, float]:
    """Return width and height of a heat map with its labels in inches."""
    names = short_names(grid.kinds)
    longest = min(max(map(len, names), default=0), LONGEST_LABEL)
    below = 0.3 if longest <= SHORT_LABEL else 0.25 + 0.05 * longest
    width = 0.5 + cell_width * max(len(grid.kinds), 2)
    return width, 0.35 + below + cell_height * max(len(grid.layers), 2)


def _luminance(image: "AxesImage", value: float) -> float:
    """Return how light the color of a value is, from 0 to 1 (Rec. 709)."""
    red, green, blue, _ = image.cmap(image.norm(np.asarray(value)))
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def _known_cells(cells: Cells) -> Iterator[tuple[int, int, float]]:
    """Yield (row, column, value) of each cell that has a value."""
    for row, column in np.argwhere(~np.isnan(cells)).tolist():
        yield row, column, float(cells[row, column])


def add_color_bar(
    figure: "Figure", panel: "Axes", name: str, panels: "list[Axes] | None" = None
) -> None:
    """Add a color bar with whole numbers, unless it has no name.

    Args:
        figure: the figure.
        panel: its first image has the colors.
        name: label of the bar.
        panels: panels that the bar stands beside, by default `panel`.
    """
    from matplotlib.ticker import MaxNLocator

    if name:
        bar = figure.colorbar(panel.images[0], ax=panels or panel, aspect=30, pad=0.02)
        bar.set_label(name, fontsize=SMALL)
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        bar.ax.tick_params(labelsize=SMALL)
