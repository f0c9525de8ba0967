"""Read rows of Arrow data: Parquet, Arrow files, and data sets of the library `datasets`.

A value with a type becomes its text. Integers are their digits, decimals keep all of their places,
floating-point numbers are the shortest text that reads back as the same number, dates and times are
those of Python ("2024-03-01 10:00:00"), booleans are "true" and "false".
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptrank._errors import UserError
from adaptrank.data.tables import Part, RawRow
from adaptrank.data.text_files import opened, unreadable
from adaptrank.data.values import JSON, Unquoted

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

ROWS_AT_ONCE = 1000
"""Rows that are converted together."""

Convert = Callable[[Any], Any]
"""Function value of Arrow in Python -> value as characters."""


# ---- values


def converter(kind: Any, column: str, where: str) -> Convert:
    """Return the function that turns a value of an Arrow type into characters.

    Args:
        kind: the Arrow type.
        column: name of the column, for the error.
        where: path of the data, for the error.

    Raises:
        UserError: if values of this type have no characters.
    """
    import pyarrow.types as types

    if hasattr(kind, "storage_type"):
        if kind.extension_name == "arrow.json":
            return _unless_null(JSON.decode)
        return converter(kind.storage_type, column, where)
    if types.is_dictionary(kind):
        return converter(kind.value_type, column, where)
    if types.is_struct(kind):
        fields = {
            field.name: converter(field.type, f"{column}[{field.name}]", where) for field in kind
        }
        return _unless_null(lambda value: {key: fields[key](value[key]) for key in value})
    if types.is_nested(kind) and hasattr(kind, "value_field"):
        convert = converter(kind.value_type, column, where)
        return _unless_null(lambda values: [convert(value) for value in values])
    convert_scalar = _scalar_converter(kind)
    if convert_scalar is None:
        raise UserError(
            f"{where!r} has values of type {kind} in column {column!r}, which are no text. Use "
            "another column, or save it as text."
        )
    return _unless_null(convert_scalar)


def _unless_null(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _scalar_converter(kind: Any) -> Convert | None:
    """Return the function for a type without parts, or None if its values are no text."""
    import pyarrow.types as types

    narrow = {"float": np.float32, "halffloat": np.float16}.get(str(kind))
    tests: list[tuple[Callable[[Any], bool], Convert]] = [
        (types.is_null, str),
        (_is_string, str),
        (types.is_boolean, bool),
        (types.is_integer, lambda value: Unquoted(int(value))),
        (types.is_floating, lambda value: Unquoted(narrow(value) if narrow else float(value))),
        (types.is_decimal, _decimal_text),
        (types.is_temporal, str),
    ]
    return next((convert for test, convert in tests if test(kind)), None)


def _is_string(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _decimal_text(value: Decimal) -> Unquoted:
    return Unquoted(format(value, "f"))


def characters_of(batch: Any, columns: Sequence[str], where: str) -> Iterator[RawRow]:
    """Yield the rows of an Arrow table or record batch, with those of the columns that it has."""
    names = [name for name in columns if name in batch.schema.names]
    values = []
    for name in names:
        convert = converter(batch.schema.field(name).type, name, where)
        values.append([convert(value) for value in batch.column(name).to_pylist()])
    if not names:
        yield from ({} for _ in range(batch.num_rows))
    for row in zip(*values, strict=True):
        yield dict(zip(names, row, strict=True))


# ---- files and data sets


class ArrowPart(Part):
    """The rows of a Parquet or Arrow file.

    Args:
        file: the file.
        kind: "parquet" or "arrow".
    """

    fills_nulls = True

    def __init__(self, file: Path, kind: str) -> None:
        with _reader(file, kind) as reader:
            self.schema = reader.schema_arrow if kind == "parquet" else reader.schema
            if kind == "parquet":
                count = reader.metadata.num_rows
            else:
                count = sum(batch.num_rows for batch in _ipc_batches(reader))
        repeated = [name for name in self.schema.names if self.schema.names.count(name) > 1]
        if repeated:
            raise unreadable(file, kind, f"two columns are named {repeated[0]!r}")
        super().__init__(self.schema.names, count)
        self.file = file
        self.kind = kind

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        with _reader(self.file, self.kind) as reader:
            names = [name for name in columns if name in self.columns]
            if self.kind == "parquet":
                batches = reader.iter_batches(batch_size=ROWS_AT_ONCE, columns=names)
            else:
                batches = _ipc_batches(reader)
            for batch in batches:
                yield from characters_of(batch, names, str(self.file))

    def class_names(self, column: str) -> list[str] | None:
        from datasets.features import Features

        # The library `datasets` notes its own types beside those of Arrow.
        if b"huggingface" not in (self.schema.metadata or {}):
            return None
        return _declared_names(Features.from_arrow_schema(self.schema), column)


@contextmanager
def _reader(file: Path, kind: str) -> Iterator[Any]:
    """Open a Parquet or an Arrow file, and say errors in one sentence."""
    import pyarrow.ipc as ipc
    import pyarrow.parquet as parquet
    from pyarrow.lib import ArrowException

    try:
        with opened(file, kind) as stream:
            if kind == "parquet":
                yield parquet.ParquetFile(stream)  # type: ignore[no-untyped-call]
                return
            is_stream = stream.read(6) != b"ARROW1"
            stream.seek(0)
            open_reader: Any = ipc.open_stream if is_stream else ipc.open_file
            yield open_reader(stream)
    except (ArrowException, UnicodeDecodeError) as error:
        first_line = str(error).partition("\n")[0].rstrip(".")
        reason = f"it is damaged, cut off or of another kind ({first_line})"
        raise unreadable(file, kind, reason) from error


def _ipc_batches(reader: Any) -> Iterator[Any]:
    """Yield the record batches of an Arrow file or stream."""
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(k) for k in range(reader.num_record_batches))
    return iter(reader)


class DatasetPart(Part):
    """The rows of a data set of the library `datasets`.

    Args:
        data: the data set.
        where: path of the data, for errors.
    """

    fills_nulls = True

    def __init__(self, data: "Dataset", where: str) -> None:
        super().__init__(data.column_names, len(data))
        self.data = data
        self.where = where

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        names = [name for name in columns if name in self.columns]
        if not names:
            yield from ({} for _ in range(self.count))
            return
        # The format "arrow" decodes neither images nor sounds.
        batches = self.data.select_columns(names).with_format("arrow").iter(ROWS_AT_ONCE)
        for batch in batches:
            yield from characters_of(batch, names, self.where)

    def class_names(self, column: str) -> list[str] | None:
        return _declared_names(self.data.features, column)


def _declared_names(features: Any, column: str) -> list[str] | None:
    from datasets.features import ClassLabel

    feature = features.get(column)
    # Of a list of classes in each row.
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, ClassLabel) else None
