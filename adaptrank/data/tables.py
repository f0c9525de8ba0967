"""Tables of rows whose values are the characters in the data, read row by row."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.split_names import Origin
from adaptrank.data.text_files import Reader

RawRow = dict[str, Any]
"""Column -> value (see `adaptrank.data.values`). A column that is not there is null."""


class Part(ABC):
    """Some rows of a table, such as those of one file.

    Args:
        columns: names of the columns.
        count: number of rows.
    """

    fills_nulls = False
    """Whether every object of a column has the keys of all of them, null where it has none."""

    def __init__(self, columns: Sequence[str], count: int) -> None:
        self.columns = list(columns)
        self.count = count

    @abstractmethod
    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        """Yield the rows. Other columns than the given ones may be missing."""

    def place(self, k: int) -> str:
        """Return where row k stands, such as "line 3 of 'a.csv'", or ""."""
        return ""

    def class_names(self, column: str) -> list[str] | None:
        """Return the names of the classes that a column declares, or None."""
        return None


class TextPart(Part):
    """The rows of one text file.

    The file is read once when the part is made, so that every line has been checked, and again for
    each use of the rows. Nothing of it stays in memory.

    Args:
        file: the file.
        read: the function that reads it.
    """

    def __init__(self, file: Path, read: Reader) -> None:
        status = file.stat()
        columns, count = _scan(file, read, status.st_mtime_ns, status.st_size)
        super().__init__(columns, count)
        self.file = file
        self.read = read

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        return (row for _, row in self.read(self.file))

    def place(self, k: int) -> str:
        line, _ = next(islice(self.read(self.file), k, None))
        return f"line {line} of {str(self.file)!r}"


@lru_cache(maxsize=1024)
def _scan(file: Path, read: Reader, modified: int, size: int) -> tuple[tuple[str, ...], int]:
    """Return the columns of a text file, in the order of their first use, and its number of rows.

    A file that was modified is scanned again.
    """
    columns: dict[str, None] = {}
    count = 0
    for _, row in read(file):
        count += 1
        if not row.keys() <= columns.keys():
            columns.update(dict.fromkeys(row))
    return tuple(columns), count


class Table:
    """Rows of several parts, or some ranges of these rows.

    Args:
        parts: the parts.
        ranges: (first, last + 1) rows to take, by default all.
        origin: names by which the parts were chosen.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        ranges: Sequence[tuple[int, int]] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.parts = parts
        self.origin = origin or Origin()
        whole = sum(part.count for part in parts)
        self.ranges = [(0, whole)] if ranges is None else ranges

    @property
    def column_names(self) -> list[str]:
        """Names of the columns that at least one part has."""
        return list(dict.fromkeys(chain.from_iterable(part.columns for part in self.parts)))

    @property
    def fills_nulls(self) -> bool:
        """Whether objects may have keys that are null because others have them."""
        return any(part.fills_nulls for part in self.parts)

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        """Yield the rows with at least the given columns. A missing column is null."""
        for start, stop in self.ranges:
            parts = (part.rows(columns) for part in self.parts)
            yield from islice(chain.from_iterable(parts), start, stop)

    def place(self, k: int) -> str:
        """Return where row k stands, such as "line 3 of 'a.csv'", or ""."""
        for start, stop in self.ranges:
            if k < stop - start:
                return self._place_of_whole(start + k)
            k -= stop - start
        return ""

    def _place_of_whole(self, k: int) -> str:
        """Return where row k of all parts stands."""
        for part in self.parts:
            if k < part.count:
                return part.place(k)
            k -= part.count
        return ""

    def class_names(self, column: str) -> list[str] | None:
        """Return the names of the classes that a column declares, or None."""
        names = [part.class_names(column) for part in self.parts]
        if any(other != names[0] for other in names):
            raise UserError(
                f"Files of one source declare different classes in {column!r}: {names}. Make each "
                "file a source of its own."
            )
        return names[0] if names else None
