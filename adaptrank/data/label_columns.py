"""Read labels of every form: a class, several classes, a number, several numbers."""

from collections.abc import Sequence
from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.class_index import parse_class, parse_number
from adaptrank.data.sources import Source
from adaptrank.data.tables import Table
from adaptrank.data.values import Unquoted

FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1}
"""Characters of a cell that says whether a row has a class -> 0 or 1."""


def read_columns(table: Table, source: Source, columns: Sequence[str]) -> list[list[Any]]:
    """Return the values of some columns, a list for each row.

    Raises:
        UserError: if there is no such column, or a value is null.
    """
    known = table.column_names
    for column in columns:
        if column not in known:
            raise UserError(
                f"labels: {source.path!r} has no column {column!r}, only {known}."
                f"{did_you_mean(column, known)}"
            )
    rows = []
    for k, row in enumerate(table.rows(columns)):
        values = [row.get(column) for column in columns]
        if None in values:
            raise UserError(
                f"Row {k} of {source.path!r} has no value in {columns[values.index(None)]!r}. "
                "Fill in or remove such rows."
            )
        rows.append(values)
    return rows


def parse_flags(values: Sequence[Any], where: str) -> list[int]:
    """Return a 0 or a 1 for each class, from the cells of its column.

    Raises:
        UserError: if a cell is neither 0, 1, false nor true.
    """
    flags = []
    for value in values:
        text = str(value).lower() if isinstance(value, bool) else str(value).strip().lower()
        text = text.removesuffix(".0")
        if text not in FLAGS:
            raise UserError(f"{where}: {value!r} is neither 0 nor 1. Use one for each class.")
        flags.append(FLAGS[text])
    return flags


def parse_classes(label: Any, where: str, separator: str | None) -> list[str]:
    """Return the classes that a label names: those of a list, or the parts of a text.

    Args:
        label: a list of labels, or a text. An empty text names none.
        where: place of the row, for the error.
        separator: characters between the names in a text, or None where a text is one name.

    Raises:
        UserError: if a part is no label.
    """
    if isinstance(label, str) and not isinstance(label, Unquoted):
        parts: list[Any] = [label] if separator is None else label.split(separator)
        label = [part.strip() if separator else part for part in parts if part.strip()]
    elif not isinstance(label, list):
        label = [label]
    return list(dict.fromkeys(parse_class(part, where) for part in label))


def parse_numbers(values: Sequence[Any], where: str) -> list[float]:
    """Return the numbers of several columns, or of a list.

    Raises:
        UserError: if one is no finite number.
    """
    return [parse_number(value, where) for value in values]
