"""Picture of an accuracy matrix over tasks."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adaptrank.reports.figures.drawing import (
    NORMAL,
    UNITS_COLORS,
    Cells,
    draw_heat_map,
    map_size,
    new_figure,
    save,
    write_numbers,
)
from adaptrank.reports.layer_grid import LayerGrid
from adaptrank.reports.task_history import TaskHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_WRITTEN_TASKS = 20
"""Number of tasks up to which accuracies are written into the cells."""


def draw_tasks(tasks: TaskHistory, folder: Path) -> Path:
    """Draw the accuracy matrix of a run into a folder, and return the file.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    file = folder / "tasks.png"
    save(task_figure(tasks), file)
    return file


def task_figure(tasks: TaskHistory) -> "Figure":
    """Draw the accuracies in percent: a row for each task that ended, a column for each task."""
    grid = _grid(tasks)
    cells = _cells(tasks)
    width, height = map_size(grid, 0.5, 0.3)
    figure = new_figure(max(width + 0.4, 3.5), height + 0.3)
    panel = figure.subplots()
    title = "accuracy in percent"
    image = draw_heat_map(panel, cells, grid, title, UNITS_COLORS, 0, 100)
    panel.set_xlabel("task", fontsize=NORMAL)
    panel.set_ylabel("after task", fontsize=NORMAL)
    if len(tasks.accuracy) <= MOST_WRITTEN_TASKS:
        write_numbers(panel, cells, image, ".0f")
    else:
        figure.colorbar(image, ax=panel, aspect=30, pad=0.02)
    return figure


def _grid(tasks: TaskHistory) -> LayerGrid:
    """Return the names of the rows and the columns: the numbers of the tasks."""
    numbers = [str(number) for number in range(1, len(tasks.accuracy) + 1)]
    return LayerGrid(numbers, numbers, {})


def _cells(tasks: TaskHistory) -> Cells:
    """Return the accuracies in percent, NaN where there is none."""
    size = len(tasks.accuracy)
    cells = np.full((size, size), np.nan)
    for after, row in enumerate(tasks.accuracy):
        for task, accuracy in enumerate(row):
            if accuracy is not None:
                cells[after, task] = 100 * accuracy
    return cells
