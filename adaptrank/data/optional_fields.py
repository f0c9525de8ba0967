"""Compare which optional fields the tables of some data have, between sources and splits."""

from collections.abc import Iterator, Mapping

from adaptrank._errors import UserError
from adaptrank.data.sources import Source
from adaptrank.data.split_names import quoted
from adaptrank.data.tables import Table

TableKey = tuple[str, ...]
"""Place of a table, and the templates of its source."""


class OptionalFields:
    """Optional fields of some data, which all tables should have, or none.

    A field in a column of another name looks just like no field. So a table without a field that
    another table has is found, whether it is of another source or of another split.

    Args:
        meanings: field -> what rows with it have, for the error.
    """

    def __init__(self, meanings: Mapping[str, str]) -> None:
        self._meanings = meanings
        # Table -> its fields among these.
        self._fields: dict[TableKey, frozenset[str]] = {}

    def differences(self, table: Table, source: Source) -> Iterator[tuple[str, str, str]]:
        """Yield (field, place of a table with it, place of a table without it).

        The table is compared with all tables that were given before.
        """
        names = f" ({quoted(table.origin.names)})" if table.origin.names else ""
        place = f"{source.path!r}{names}"
        templates = [str(getattr(source, field, None)) for field in self._meanings]
        fields = frozenset(field for field in self._meanings if has_field(table, source, field))
        # A table that is read again may have changed on the disk.
        self._fields[place, *templates] = fields
        for (other, *_), other_fields in self._fields.items():
            for field in sorted(fields ^ other_fields):
                yield (field, place, other) if field in fields else (field, other, place)

    def check(self, table: Table, source: Source) -> None:
        """Refuse a table that has a field which another table has not, or the other way around.

        Raises:
            UserError: naming both tables and the field.
        """
        for field, with_field, without in self.differences(table, source):
            raise UserError(
                f"{with_field} has {self._meanings[field]}, and {without} has no column for "
                f'`{field}`. Name its column, or set `{field}: ""` for that source if it is to '
                "have none."
            )

    def conventions(self) -> dict[str, list[str]]:
        """Return the fields that the data have, for the adapter's file, or {} before any table."""
        if not self._fields:
            return {}
        return {"fields": sorted(next(iter(self._fields.values())))}


def has_field(table: Table, source: Source, field: str) -> bool:
    """Tell whether a source sets a field, or a table has a column of its name."""
    return getattr(source, field, None) is not None or field in table.column_names
