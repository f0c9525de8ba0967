"""Figures of matplotlib, and one heat map: one row a layer, one column a kind of layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adaptrank.reports.escaping import in_picture
from adaptrank.reports.layer_grid import LayerGrid

if TYPE_CHECKING:
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
MOST_WRITTEN_CELLS = 1500
"""Number of cells up to which a map has the numbers written into them."""
LARGEST_FIGURE = 32.0
"""Largest width and height of a figure in inches."""


@dataclass(frozen=True)
class TextStyle:
    """Sizes of the title and of the labels in points, and the angle of the column labels."""

    title: int
    labels: int
    angle: int


def new_figure(width: float, height: float, **options: Any) -> "Figure":
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
    return Figure(figsize=(min(width, LARGEST_FIGURE), min(height, LARGEST_FIGURE)), **options)


def draw_heat_map(
    panel: "Axes",
    cells: Cells,
    grid: LayerGrid,
    title: str,
    style: TextStyle,
    row_step: int = 1,
    **colors: Any,
) -> "AxesImage":
    """Draw one heat map.

    Args:
        panel: panel of a figure to draw in.
        cells: values (layers, kinds).
        grid: names of the rows and the columns.
        title: title of the panel.
        style: sizes of the texts.
        row_step: distance of the rows that have a label.
        colors: arguments of `imshow` about colors.
    """
    image = panel.imshow(cells, aspect="auto", **colors)
    panel.set_title(label(title, LONGEST_TITLE), fontsize=style.title)
    columns = range(0, len(grid.kinds), -(-len(grid.kinds) // LABELLED_COLUMNS))
    panel.set_xticks(
        columns,
        [label(grid.kinds[column]) for column in columns],
        rotation=style.angle,
        ha="right",
        fontsize=style.labels,
    )
    rows = range(0, len(grid.layers), row_step)
    panel.set_yticks(rows, [label(grid.layers[row]) for row in rows], fontsize=style.labels)
    return image


def label(text: str, longest: int = LONGEST_LABEL) -> str:
    """Return a text of a file as a label: not too long, and without formulas."""
    short = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return in_picture(short)


def empty_cells(grid: LayerGrid) -> Cells:
    """Return cells of a grid without a value."""
    return np.full((len(grid.layers), len(grid.kinds)), np.nan)
