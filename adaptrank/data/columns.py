"""Make rows of fields from the columns of a data set."""

import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.sources import Source
from adaptrank.data.task import Row

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

FieldReader = Callable[[Row], Any]
"""Function row of the data set -> value of a field."""


def field_reader(field: str, template: str, columns: list[str], path: str) -> FieldReader:
    """Make the function that reads a field from a row.

    Args:
        field: name of the field, for errors.
        template: name of a column, or a format string over columns.
        columns: names of all columns.
        path: path of the source, for errors.

    Raises:
        UserError: if the template is no format string, or if a column does not exist.
    """
    if template == "":
        return lambda row: ""
    formatter = string.Formatter()
    try:
        parts = list(formatter.parse(template))
    except ValueError as error:
        raise UserError(
            f"{field}: {template!r} is no format string ({error}). Double a brace to mean itself."
        ) from error
    gaps = [gap for _, gap, _, _ in parts if gap is not None]
    used = [gap.split("[")[0].split(".")[0] for gap in gaps] or [template]
    _check_columns(field, used, columns, path)
    if not gaps:
        return lambda row: row[template]
    literal, gap, spec, conversion = parts[0]
    is_bare_gap = len(parts) == 1 and not (literal or spec or conversion)
    if is_bare_gap and gap is not None:
        # One gap alone keeps the type of its value, where a format string would make a text of it.
        return lambda row: formatter.get_field(gap, (), row)[0]
    return lambda row: formatter.vformat(template, (), row)


def _check_columns(field: str, used: list[str], columns: list[str], path: str) -> None:
    for column in used:
        if column not in columns:
            raise UserError(
                f"{field}: {path!r} has no column {column!r}, only {columns}."
                f"{did_you_mean(column, columns)}"
            )


def read_fields(
    data: "Dataset", source: Source, fields: Sequence[str], required: Sequence[str]
) -> list[Row]:
    """Return rows of fields. A field that is null in a row is left out of it.

    Args:
        data: the data set.
        source: the source, which says how to read fields.
        fields: fields to read, where the source or a column has them.
        required: fields that every row must have.

    Raises:
        UserError: if a required field has no column, or no value in some row.
    """
    columns = list(data.column_names)
    readers = _field_readers(source, fields, columns)
    for field in required:
        if field not in readers:
            raise UserError(
                f"{source.path!r} has no column {field!r}, only {columns}."
                f"{did_you_mean(field, columns)} "
                f'Say how to make it, for example {field}: "{{{columns[0]}}}".'
            )
    rows = []
    for k, raw in enumerate(data):
        row = _read_row(raw, readers)
        for field in required:
            if field not in row:
                raise UserError(
                    f"Row {k} of {source.path!r} has no {field!r} (it is null). Remove or fill "
                    "such rows."
                )
        rows.append(row)
    return rows


def _field_readers(
    source: Source, fields: Sequence[str], columns: list[str]
) -> dict[str, FieldReader]:
    """Return a reader for each field that the source sets, or that has a column of its name."""
    readers = {}
    for field in fields:
        template = getattr(source, field)
        if template is None and field in columns:
            template = field
        if template is not None:
            readers[field] = field_reader(field, template, columns, source.path)
    return readers


def _read_row(raw: Any, readers: dict[str, FieldReader]) -> Row:
    row = {}
    for field, read in readers.items():
        value = read(raw)
        if value is not None:
            row[field] = value
    return row
