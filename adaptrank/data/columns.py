"""Make rows of fields from the columns of a table."""

import logging
import re
import string
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.sources import Source
from adaptrank.data.tables import RawRow, Table
from adaptrank.data.task import Row
from adaptrank.data.values import Unquoted, as_text

log = logging.getLogger(__name__)

TEXT_FIELDS = (
    "prompt",
    "completion",
    "answer",
    "text",
    "text_pair",
    "source",
    "target",
    "question",
    "context",
    "system",
)
"""Fields that are texts. The others keep the form of their value."""

WIDEST = 10_000
"""Largest width or precision of a format in a template."""

STEP = re.compile(r"\.([^.\[]*)|\[([^\]]*)\]")
"""A step into a value: an attribute, or a key or an index in brackets."""


class NullError(Exception):
    """A template needs a value that is null."""


class MisfitError(ValueError):
    """A value does not fit its place in a template."""


class _Formatter(string.Formatter):
    """Fill in a template with the characters of values.

    Args:
        null_is_empty: write nothing where a value is null.
    """

    def __init__(self, null_is_empty: bool) -> None:
        self.null_is_empty = null_is_empty

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value = reach(field_name, kwargs)
        if value is None:
            if not self.null_is_empty:
                raise NullError(repr(field_name))
            value = ""
        return value, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        try:
            text = as_text(value)
        except TypeError as error:
            raise MisfitError(f"{error}. Name a part of it, as in {{column[key]}}") from error
        if not format_spec:
            return text
        # A template may come from the file of an adapter.
        if any(int(number[:9]) > WIDEST for number in re.findall(r"\d+", format_spec)):
            raise MisfitError(f"the format {format_spec!r} asks for more than {WIDEST} characters")
        return _format_text(text, format_spec, isinstance(value, Unquoted))


def _format_text(text: str, spec: str, is_number: bool) -> str:
    """Format a text as a text, or where the format asks for a number, as the number it spells.

    Args:
        text: characters of the value.
        spec: format, as in ".2f" or "03".
        is_number: whether the value is a number without quotes.
    """
    # A zero before the width, a precision or a separator means something else for a text.
    pads_by_zeros = re.match(r"[-+ ]?0\d", spec) is not None
    asks_for_digits = is_number and re.search(r"[.,_]", spec) is not None
    if spec.endswith("s") or not (pads_by_zeros or asks_for_digits):
        try:
            return format(text, spec)
        except ValueError:
            pass
    is_of_integers = spec[-1] in "bcdoxX"
    try:
        number = Decimal(text)
        if is_of_integers and number != int(number):
            raise ValueError
        return format(int(number) if is_of_integers else number, spec)
    except (ValueError, ArithmeticError) as error:
        kind = "a whole number" if is_of_integers else "a number"
        raise MisfitError(f"the format {spec!r} asks for {kind}, and {text!r} is none") from error


def reach(name: str, row: RawRow) -> Any:
    """Return the value that a name such as "options[text][0]" means in a row, or None.

    Raises:
        MisfitError: if the name reaches inside of a text.
    """
    if name in row:
        return row[name]
    column = column_of(name)
    value = row.get(column)
    for attribute, key in STEP.findall(name[len(column) :]):
        if value is None:
            return None
        if attribute or not isinstance(value, dict | list):
            raise MisfitError(
                f"{{{name}}} reaches inside of {repr(value)[:40]}, which has no such part"
            )
        if isinstance(value, dict):
            value = value.get(key)
        elif key.isdecimal():
            value = value[int(key)] if int(key) < len(value) else None
        else:
            raise MisfitError(f"{{{name}}} names {key!r}, and a list has numbers from 0")
    return value


def fill_template(template: str, row: RawRow) -> str:
    """Return a template filled with the characters of the values in a row.

    Args:
        template: format string over columns.
        row: the columns.

    Raises:
        NullError: if a value is null.
        MisfitError: if a value does not fit its place.
    """
    return _Formatter(null_is_empty=False).vformat(template, (), row)


def column_of(name: str) -> str:
    """Return the column at the beginning of a name such as "options[text][0]"."""
    return re.split(r"[.\[]", name, maxsplit=1)[0]


class FieldReader:
    """Reads a field from a row.

    Args:
        field: name of the field, for errors.
        template: name of a column, or a format string over columns.
        columns: names of all columns.
        path: path of the source, for errors.
        null_is_empty: a null in a text is "".

    Raises:
        UserError: if the template is no format string, or if a column does not exist.
    """

    def __init__(
        self,
        field: str,
        template: str,
        columns: list[str],
        path: str,
        null_is_empty: bool = False,
    ) -> None:
        self.template = template
        self.is_text = field in TEXT_FIELDS
        self.null_is_empty = null_is_empty
        self.formatter = _Formatter(null_is_empty)
        # Name of the one column, or of the one part of a column, that is the whole field.
        self.bare: str | None = None
        # Columns that the field is made of.
        self.columns: list[str] = []
        if template and template in columns:
            self.bare = template
            self.columns = [template]
        elif template:
            self._parse(field, columns, path)

    def _parse(self, field: str, columns: list[str], path: str) -> None:
        gaps = _gaps(field, self.template)
        names = [name for name, _ in gaps] or [self.template]
        for name in names:
            # Without a gap, the template has to be the whole name of a column.
            column = name if name in columns or not gaps else column_of(name)
            if column not in columns or not name:
                raise UserError(
                    f"{field}: {path!r} has no column {column!r}, only {columns}."
                    f"{did_you_mean(column, columns)}"
                )
            self.columns.append(column)
        if len(gaps) == 1 and gaps[0][1]:
            self.bare = gaps[0][0]

    def read(self, row: RawRow) -> Any:
        """Return the field's value in a row, or None if a column that it needs is null.

        Raises:
            MisfitError: if a value has another form than the field.
        """
        if self.bare is None:
            try:
                return self.formatter.vformat(self.template, (), row)
            except NullError:
                return None
        # One gap alone keeps the form of its value.
        value = reach(self.bare, row)
        if not self.is_text:
            return value
        if value is None:
            return "" if self.null_is_empty else None
        return self.formatter.format_field(value, "")


def _gaps(field: str, template: str) -> list[tuple[str, bool]]:
    """Return (name, is the whole template) of the gaps of a format string."""
    formatter = string.Formatter()
    gaps = []
    try:
        parts = list(formatter.parse(template))
        for literal, name, spec, conversion in parts:
            if name is not None:
                is_whole = len(parts) == 1 and not (literal or spec or conversion)
                gaps.append((name, is_whole))
            gaps += [(inner, False) for _, inner, _, _ in formatter.parse(spec or "") if inner]
    except ValueError as error:
        raise UserError(
            f"{field}: {template!r} is no format string ({error}). Double a brace to mean itself."
        ) from error
    return gaps


def read_fields(
    table: Table, source: Source, fields: Sequence[str], required: Sequence[str]
) -> list[Row]:
    """Return rows of fields. A field that is null in a row is left out of it.

    Args:
        table: the table.
        source: the source, which says how to read fields.
        fields: fields to read, where the source or a column has them.
        required: fields that every row must have.

    Raises:
        UserError: if a required field has no column, or no value in some row.
    """
    columns = table.column_names
    readers = _field_readers(source, fields, columns)
    example = next(filter(None, columns), "column")
    for field in required:
        if field not in readers:
            raise UserError(
                f"{source.path!r} has no column {field!r}, only {columns}."
                f"{did_you_mean(field, columns)} "
                f'Say how to make it, for example {field}: "{{{example}}}".'
            )
    used = {column: None for reader in readers.values() for column in reader.columns}
    rows = []
    for k, raw in enumerate(table.rows(list(used))):
        row = {}
        for field, reader in readers.items():
            try:
                value = reader.read(raw)
            except MisfitError as error:
                raise UserError(f"Row {k} of {source.path!r}: {field}: {error}.") from error
            if value is not None:
                row[field] = value
            elif field in required:
                raise _null_error(table, source, k, raw, field, reader)
        rows.append(row)
    _warn_of_empty(rows, source)
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
            readers[field] = FieldReader(
                field, template, columns, source.path, bool(source.null_is_empty)
            )
    return readers


def _null_error(
    table: Table, source: Source, k: int, row: RawRow, field: str, reader: FieldReader
) -> UserError:
    place = table.place(k)
    null = [column for column in reader.columns if row.get(column) is None]
    cause = f"a part that {reader.template!r} names is null"
    if null:
        cause = "it is null" if null == [field] else f"{null[0]!r} is null"
    advice = "Remove or fill such rows"
    # None means that nothing sets it, as in `generate`.
    if reader.is_text and source.null_is_empty is not None:
        advice += ", or set `null_is_empty: true`"
    return UserError(
        f"Row {k} of {source.path!r} has no {field!r} ({cause}{f' in {place}' if place else ''}). "
        f"{advice}."
    )


def _warn_of_empty(rows: list[Row], source: Source) -> None:
    """Warn if some completions are empty: such a row trains the end token and nothing else."""
    count = sum(row.get("completion") == "" for row in rows)
    if count:
        log.warning("%d of %d completions of %r are empty.", count, len(rows), source.path)
