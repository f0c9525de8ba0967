"""Figures of matplotlib, and one heat map: one row a layer, one column a kind of layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adaptrank.reports.layer_grid import LayerGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Cells = NDArray[np.float64]
"""Values of a grid (layers, kinds), NaN where there is none."""

LABELLED_ROWS = 16
"""Number of rows up to which every row has a label."""


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
    return Figure(figsize=(width, height), **options)


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
    panel.set_title(title, fontsize=style.title)
    panel.set_xticks(
        range(len(grid.kinds)), grid.kinds, rotation=style.angle, ha="right", fontsize=style.labels
    )
    rows = range(0, len(grid.layers), row_step)
    panel.set_yticks(rows, [grid.layers[row] for row in rows], fontsize=style.labels)
    return image


def empty_cells(grid: LayerGrid) -> Cells:
    """Return cells of a grid without a value."""
    return np.full((len(grid.layers), len(grid.kinds)), np.nan)
