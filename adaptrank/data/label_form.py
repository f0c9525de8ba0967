"""Form of the labels in the data: a class, several classes, or numbers, in one or more columns."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.class_index import ClassIndex, parse_class, parse_number
from adaptrank.data.files import declared_classes
from adaptrank.data.label_columns import parse_classes, parse_flags, parse_numbers, read_columns
from adaptrank.data.labelled_data import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from adaptrank.data.mixing import ReadRows, SourceMix
from adaptrank.data.sources import Source
from adaptrank.data.stratify import rarest
from adaptrank.data.tables import Table
from adaptrank.data.task import Row


class LabelForm:
    """Form of the labels in some data, and the classes that they name.

    Args:
        regression: labels are numbers.
        multi_label: a row has any number of classes.
        columns: columns that hold the label, or None for the one column `label`.
        separator: characters between the classes in the text of a label.
        classes: names of the classes in the order of their indices, or None to find them.
        stratify: rows will be shared out by their classes.

    Raises:
        UserError: if two of them exclude each other.
    """

    def __init__(
        self,
        regression: bool = False,
        multi_label: bool = False,
        columns: list[str] | None = None,
        separator: str | None = None,
        classes: list[str] | None = None,
        stratify: bool = False,
    ) -> None:
        if regression and multi_label:
            raise UserError(
                "`regression` predicts numbers, and `multi_label` classes. Remove one of the two."
            )
        if regression and classes is not None:
            raise UserError(
                f"`regression` predicts a number, so there are no `classes` {classes}. Remove "
                "one of the two."
            )
        if regression and stratify:
            raise UserError(
                "`stratify` shares rows out by their classes, and a regression has none. Remove "
                "one of the two."
            )
        _check_columns(columns, regression or multi_label, classes)
        if separator is not None and (not multi_label or columns is not None or not separator):
            raise UserError(
                f"separator={separator!r} splits a label into several classes. Use it with "
                "`multi_label: true` and one column of labels, such as separator: ';'."
            )
        self.problem = SINGLE_LABEL
        if regression or multi_label:
            self.problem = REGRESSION if regression else MULTI_LABEL
        self.columns = columns
        self.separator = separator
        self.index = ClassIndex(columns if multi_label and columns else classes)
        # Number of numbers in a label of a regression without `columns`.
        self._numbers = 1

    @property
    def names(self) -> list[str] | None:
        """Names of the classes, or of several numbers to predict, once they are known."""
        if self.problem == REGRESSION:
            return self.columns if self.columns and len(self.columns) > 1 else None
        return self.index.names

    @property
    def size(self) -> int | None:
        """Number of classes, or of numbers to predict, once it is known."""
        if self.problem == REGRESSION:
            return len(self.columns) if self.columns else self._numbers
        return None if self.index.names is None else len(self.index.names)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a source that hold the label."""
        return () if self.columns else ("label",)

    # ---- labels of rows

    def parse(self, rows: list[Row], table: Table, source: Source) -> None:
        """Set the label of each row as its parts stand in the data.

        Args:
            rows: rows with the fields of this form.
            table: the table that they come from.
            source: its source.

        Raises:
            UserError: if a label has another form.
        """
        if self.columns:
            values = read_columns(table, source, self.columns)
            for row, cells in zip(rows, values, strict=True):
                row["label"] = cells
        for k, row in enumerate(rows):
            row["label"] = self._parse(row["label"], f"Row {k} of {source.path!r}")

    def _parse(self, label: Any, where: str) -> Any:
        if self.problem == SINGLE_LABEL:
            return parse_class(label, where)
        if self.problem == MULTI_LABEL:
            if self.columns:
                return parse_flags(label, where)
            return parse_classes(label, where, self.separator)
        if self.columns and len(self.columns) == 1:
            return parse_number(label[0], where)
        is_of_several = isinstance(label, list) and len(label) > 1
        return parse_numbers(label, where) if is_of_several else parse_number(label, where)

    def number(self, rows: list[Row], table: Table, source: Source) -> None:
        """Replace the parts of parsed labels by indices of classes, or by a 0 or 1 for each class.

        Raises:
            UserError: if a label is none of the classes, or labels differ in their length.
        """
        if self.problem == REGRESSION:
            self._check_lengths(rows, source)
            return
        if self.columns:
            return
        declared = table.class_names(label_column(source))
        indices = None if declared is None else self.index.of_column(declared)
        for k, row in enumerate(rows):
            where = f"Row {k} of {source.path!r}"
            if self.problem == SINGLE_LABEL:
                row["label"] = self.index.index(row["label"], where, indices)
                continue
            chosen = {self.index.index(label, where, indices) for label in row["label"]}
            row["label"] = [int(index in chosen) for index in range(self.size or 0)]

    def _check_lengths(self, rows: list[Row], source: Source) -> None:
        """Note how many numbers a label has. All labels need the same."""
        for k, row in enumerate(rows):
            length = len(row["label"]) if isinstance(row["label"], list) else 1
            if self._numbers == 1 and k == 0:
                self._numbers = length
            if length != self._numbers:
                raise UserError(
                    f"Row {k} of {source.path!r}: the label has {length} number(s), and others "
                    f"have {self._numbers}. Give each row as many."
                )

    def groups(self, rows: list[Row]) -> Sequence[Hashable]:
        """Return the class of each row by name, or the rarest of its classes."""
        names = self.names or []
        if self.problem == SINGLE_LABEL:
            return [names[row["label"]] for row in rows]
        sets = []
        for row in rows:
            sets.append([name for name, flag in zip(names, row["label"], strict=True) if flag])
        return rarest(sets)

    # ---- names

    def find_names(self, sources: SourceMix, read: ReadRows) -> None:
        """Find the names of the classes, unless they are known.

        Args:
            sources: the sources of the data.
            read: function (table, source) -> rows with parsed labels.
        """
        if self.problem == REGRESSION:
            return

        def labels() -> list[str]:
            found = [row["label"] for row in sources.rows_of_classes(read)]
            if self.problem == SINGLE_LABEL:
                return found
            parts: list[str] = []
            for label in found:
                parts += label
            return parts

        self.index.find(lambda: declared_in(sources), labels)


def _check_columns(
    columns: list[str] | None, takes_several: bool, classes: list[str] | None
) -> None:
    """Refuse the key `labels` where it makes no sense."""
    if columns is None:
        return
    if not takes_several:
        raise UserError(
            f"`labels` {columns} names a column for each class or number. Set "
            "`multi_label: true`, or `regression: true`, or use `label` for one column."
        )
    if not columns or len(set(columns)) < len(columns):
        raise UserError(f"`labels` {columns} has to name different columns, at least one.")
    if classes is not None:
        raise UserError(
            f"`labels` {columns} names the classes by their columns, so `classes` {classes} has no "
            "use. Remove one of the two."
        )


def declared_in(sources: SourceMix, field: str = "label") -> list[str] | None:
    """Return the names that the training sources declare, or None if none does.

    Args:
        sources: the sources of some data.
        field: field of a source that holds the labels.

    Raises:
        UserError: if sources declare different names.
    """
    by_path: dict[str, list[str]] = {}
    for source in sources.training:
        of_field = replace(source, label=getattr(source, field) or field)
        names = declared_classes(of_field, sources.load)
        if names is not None:
            by_path[source.path] = names
    declared = list(by_path.values())
    if not declared:
        return None
    if any(names != declared[0] for names in declared):
        raise UserError(
            f"The sources name different classes: {by_path}. Give all of them in `classes`."
        )
    return declared[0]


def label_column(source: Source) -> str:
    """Return the name of the column that holds the labels."""
    return (source.label or "label").strip("{}")
