"""The report of a run over tasks: its accuracy matrix, as a picture and one page of HTML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrank._files import atomic_files
from adaptrank.reports.figures import draw_tasks
from adaptrank.reports.rendering import Picture, render
from adaptrank.reports.task_history import TaskHistory

DESCRIPTION = "Heat map of the accuracy on each task after each task"

CAPTION = (
    "A row is a moment, the end of a task, and a column is a task. The diagonal shows how well a "
    "task was learned, and a column downwards how it is forgotten. Predictions choose among all "
    "classes seen so far."
)

MEANINGS = {
    "average_accuracy": "mean accuracy over all tasks, at the end",
    "average_incremental_accuracy": "mean, over the ends of all tasks, of the average accuracy",
    "forgetting": "how far tasks have fallen from their best accuracy, the mean over all but the "
    "last",
    "backward_transfer": "what later tasks have done to earlier ones, the mean over all but the "
    "last",
}
"""Name of a figure -> its meaning."""

MOST_TASKS = 200
"""Largest number of tasks that a page lists."""
LONGEST_NAMES = 200
"""Characters of the names of classes in a row."""


def write_task_report(tasks: TaskHistory, out: Path) -> list[Path]:
    """Draw the picture and write the page into a folder, each file as a whole.

    Returns:
        The files, the page last.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    with atomic_files(out) as temporary:
        file = draw_tasks(tasks, temporary)
        (temporary / "index.html").write_text(page(tasks, file.read_bytes()), encoding="utf-8")
    return [out / file.name, out / "index.html"]


def page(tasks: TaskHistory, png: bytes) -> str:
    """Return the report as one HTML document, with the picture inside."""
    return render(
        "tasks.html.j2",
        title=f"Tasks of {tasks.name}",
        pictures=[Picture(DESCRIPTION, png, CAPTION)],
        **task_rows(tasks),
    )


def task_rows(tasks: TaskHistory) -> Mapping[str, Any]:
    """Return the rows of the tables of a page: `figures`, and the tasks themselves."""
    figures = [
        {"name": name.replace("_", " "), "value": f"{value:.4f}", "meaning": MEANINGS.get(name, "")}
        for name, value in tasks.figures.items()
        if value is not None
    ]
    last = tasks.accuracy[-1]
    rows = []
    for number, (names, row) in enumerate(zip(tasks.classes, tasks.accuracy, strict=False)):
        rows.append(
            {
                "number": number + 1,
                "classes": ", ".join(names)[:LONGEST_NAMES],
                "learned": _percent(row[number]),
                "end": _percent(last[number]),
            }
        )
    return {"figures": figures, "tasks": rows[:MOST_TASKS]}


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f}"
