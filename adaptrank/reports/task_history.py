"""The accuracy matrix of a run over tasks, read from the folder of the run."""

from dataclasses import dataclass
from pathlib import Path

from adaptrank._errors import UserError
from adaptrank.reports.records import (
    METRICS,
    Fields,
    check_fields,
    is_count,
    is_number,
    is_text,
    list_of,
    optional,
    read_table,
)

FILE = "tasks.json"
"""File of a run folder with the matrix."""

TASKS: Fields = {
    "classes": (list_of(list_of(is_text)), "a list of the classes of each task"),
    "examples": (list_of(is_count), "a list of whole numbers"),
    "accuracy": (list_of(list_of(optional(is_number))), "a list of rows of numbers or null"),
    "figures": METRICS,
}
"""Keys of tasks.json that a report reads."""


@dataclass(frozen=True)
class TaskHistory:
    """The accuracy matrix of a run whose classes arrived in tasks.

    Args:
        name: name of the run.
        classes: names of the classes of each task.
        examples: number of validation examples of each task that was measured.
        accuracy: R[i][j], the accuracy on task j after task i, for j <= i. None if unknown.
        figures: name -> average accuracy, forgetting and others.
    """

    name: str
    classes: list[list[str]]
    examples: list[int]
    accuracy: list[list[float | None]]
    figures: dict[str, float | None]


def read_tasks(folder: Path) -> TaskHistory | None:
    """Read the accuracy matrix of a run from its folder, or return None if it has none.

    Raises:
        UserError: if the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    record = read_table(file)
    check_fields(str(file), record, TASKS, required=True)
    rows = record["accuracy"]
    is_triangle = all(len(row) == number for number, row in enumerate(rows, 1))
    if not rows or not is_triangle or len(rows) > len(record["classes"]):
        raise UserError(
            f"{file}: accuracy must have a row for each task that ended, of 1, 2, 3 and so on "
            "numbers. The file is damaged."
        )
    name = "/".join(folder.resolve().parts[-2:])
    return TaskHistory(name, record["classes"], record["examples"], rows, record["figures"])
