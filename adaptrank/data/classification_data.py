"""Texts and their classes or scores, from files or the Hub."""

import logging
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.class_names import show
from adaptrank.data.columns import read_fields
from adaptrank.data.files import declared_classes
from adaptrank.data.label_task import LabelTask
from adaptrank.data.mixing import SourceMix
from adaptrank.data.sources import Source, Sources
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split
from adaptrank.data.values import INTEGER, NUMBER, Unquoted, as_integer

log = logging.getLogger(__name__)

BOOLEANS = ("false", "true")
"""Words without quotes that are labels. The index of each is its class where names are given."""


class ClassificationData(LabelTask):
    """Texts, or pairs of texts, and their classes or scores, from files or the Hub.

    ```yaml
    data:
      class_path: ClassificationData
      init_args: {sources: data/trec}  # a folder: train.jsonl, validation.jsonl, labels.json
    ```
    A row needs `text` and `label`, and may have `text_pair`. Labels are names or indices of
    classes. The names of the classes are `classes`, or those in the `labels.json` (a list) beside
    the file, or those that the data set declares, or else the sorted different labels of the
    training rows. A label is the characters in the data, so that 01 and 1 are two classes. If it is
    none of the names, the characters of an integer are an index. Where a trained adapter goes on,
    its classes keep their numbers, by name.

    Sources with pairs and sources without are not mixed unasked, because a pair in a column of
    another name looks just like no pair. A source of single texts among pairs says so by
    `text_pair: ""`. A pair that is null or empty in a row makes a single text of it.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation, test, predict, val_fraction: as in `CausalLMData`. Prediction needs no label.
        classes: names of the classes in the order of their indices.
        regression: labels are numbers to predict, such as 3.8, and not classes.
        text, text_pair, label: fields for every source that does not set its own.
        null_is_empty: as in `CausalLMData`. A label is never null.
        kwargs: those of `TaskData`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: if a regression has `classes`. In `setup`, if a column is missing, some sources
            have pairs and some have not, sources name different classes, or a label is none of
            them, or no number for a regression.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        val_fraction: float = 0.1,
        classes: list[str] | None = None,
        regression: bool = False,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        null_is_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if regression and classes is not None:
            raise UserError(
                f"`regression` predicts a number, so there are no `classes` {classes}. Remove "
                "one of the two."
            )
        if classes is not None and len(set(classes)) < len(classes):
            raise UserError(f"`classes` {classes} names a class twice. Give different names.")
        self.regression = regression
        settings = {
            "text": text,
            "text_pair": text_pair,
            "label": label,
            "null_is_empty": null_is_empty,
        }
        self._sources = SourceMix(
            sources, validation, test, predict, val_fraction, self.seed, settings
        )
        self._classes = classes
        # Label -> index, where the labels of the rows themselves are the names.
        self._index_of_label: dict[str, int] | None = None

    @property
    def class_names(self) -> list[str] | None:
        return self._classes

    @property
    def num_classes(self) -> int | None:
        """Number of classes, known after `setup`. It is 1 for a regression."""
        return 1 if self.regression else super().num_classes

    def setup(self, stage: str | None = None) -> None:
        module = getattr(self.trainer, "lightning_module", None)
        # A trained model knows its classes. Prediction then needs no look at the training rows.
        if stage != "predict" or getattr(module, "class_names", None) is None:
            self._find_classes()
        super().setup(stage)

    def rows(self, split: Split) -> list[Row] | None:
        is_labelled = split != "predict"
        if is_labelled:
            self._find_classes()
        # Whether rows have pairs -> path of the first source where that is so.
        path_by_pairs: dict[bool, str] = {}

        def read(table: Table, source: Source) -> list[Row]:
            rows = label_rows(table, source, labelled=is_labelled, regression=self.regression)
            declared = table.class_names(label_column(source))
            indices = None if declared is None else self._indices_of(declared)
            for k, row in enumerate(rows):
                path_by_pairs.setdefault("text_pair" in row, source.path)
                if is_labelled and not self.regression:
                    where = f"Row {k} of {source.path!r}"
                    row["label"] = self._class_index(row["label"], where, indices)
            _check_all_or_no_pairs(path_by_pairs)
            return rows

        return self._sources.rows(split, read)

    # ---- classes

    def _indices_of(self, declared: list[str]) -> list[int]:
        """Return the index of each class that a column declares, by its name where all are known.

        Other names are for people, and then the column counts the classes as `classes` does.
        """
        names = self._classes or []
        if set(declared) <= set(names):
            return [names.index(name) for name in declared]
        moved = [
            name for k, name in enumerate(declared) if name in names and names.index(name) != k
        ]
        if moved:
            raise UserError(
                f"A column of labels declares the classes {show(declared)}, and the run has "
                f"{show(names)}: {moved[0]!r} has another number. Give the names of all in "
                f"`classes`."
            )
        return list(range(len(names)))

    def _class_index(self, label: str, where: str, indices: list[int] | None) -> int:
        """Return the index of the class that a label names.

        Args:
            label: the characters of the label.
            where: place of the row, for the error.
            indices: label -> index, where the column of the labels declares its classes.
        """
        names = self._classes
        assert names is not None
        number = as_integer(label)
        index: int | None
        if indices is not None:
            index = None if number is None or not 0 <= number < len(indices) else indices[number]
        elif self._index_of_label is not None:
            index = self._index_of_label.get(label)
        elif label in names:
            index = names.index(label)
        elif isinstance(label, Unquoted) and label in BOOLEANS:
            index = BOOLEANS.index(label)
        else:
            index = number
        if index is not None and 0 <= index < len(names):
            return index
        hint = "" if isinstance(label, Unquoted) else did_you_mean(label, names)
        raise UserError(
            f"{where}: label {label!r} is none of the {len(names)} classes {show(names)}.{hint}"
        )

    def _find_classes(self) -> None:
        """Find the names of the classes, unless they are known."""
        if self.regression or self._classes is not None:
            return
        declared = self._declared_classes()
        if declared is not None:
            self._classes = declared
            return
        self._classes = self._labels_of_rows()
        self._index_of_label = {label: i for i, label in enumerate(self._classes)}

    def _declared_classes(self) -> list[str] | None:
        """Return the names that the training sources declare, or None if none does."""
        by_path: dict[str, list[str]] = {}
        for source in self._sources.training:
            names = declared_classes(source)
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

    def _labels_of_rows(self) -> list[str]:
        """Return the different labels of the training rows, sorted."""

        def read(table: Table, source: Source) -> list[Row]:
            return label_rows(table, source, labelled=True)

        labels = {row["label"]: None for row in self._sources.rows("train", read) or []}
        return sort_labels(list(labels))


def sort_labels(labels: Sequence[str]) -> list[str]:
    """Sort different labels: by value if all of them are integers, else by their characters.

    Raises:
        UserError: if some are numbers without quotes, and others are names.
    """
    are_integers = all(INTEGER.fullmatch(label) for label in labels)
    has_numbers = any(isinstance(label, Unquoted) for label in labels)
    if has_numbers and not are_integers and not set(labels) <= set(BOOLEANS):
        shown = sorted(str(label) for label in labels)
        raise UserError(f"Some labels are names and some are numbers ({shown}). Use one kind.")
    _warn_of_fractions(labels)
    ordered = sorted(labels, key=int) if are_integers else sorted(labels)
    return [str(label) for label in ordered]


def _warn_of_fractions(labels: Sequence[str]) -> None:
    """Warn if all labels spell numbers, and some of them fractions."""
    are_numbers = all(NUMBER.fullmatch(label) for label in labels)
    if are_numbers and any("." in label for label in labels):
        log.warning(
            "The labels spell numbers, such as %r, and each of the %d is the name of a class. Set "
            "`regression: true` to predict numbers.",
            str(labels[0]),
            len(labels),
        )


def _check_all_or_no_pairs(path_by_pairs: dict[bool, str]) -> None:
    """Raise if some sources have pairs of texts and some have not."""
    if len(path_by_pairs) > 1:
        raise UserError(
            f"{path_by_pairs[True]!r} has pairs of texts, and {path_by_pairs[False]!r} has no "
            "column for `text_pair`. Name its column, or set "
            '`text_pair: ""` for that source if its texts stand alone.'
        )


def label_column(source: Source) -> str:
    """Return the name of the column that holds the labels."""
    return (source.label or "label").strip("{}")


def label_rows(
    table: Table, source: Source, *, labelled: bool, regression: bool = False
) -> list[Row]:
    """Return rows with text, with text_pair if the source has pairs, and with label if asked for.

    A pair that is null is "".

    Args:
        table: the table.
        source: the source, which says how to read fields.
        labelled: read the label, as it stands in the data.
        regression: the label is a number to predict.

    Raises:
        UserError: if a field is missing, or a label is neither a name nor a whole number, or for a
            regression no number.
    """
    has_pairs = source.text_pair is not None or "text_pair" in table.column_names
    if labelled:
        rows = read_fields(table, source, ("text", "text_pair", "label"), ("text", "label"))
    else:
        rows = read_fields(table, source, ("text", "text_pair"), ("text",))
    for k, row in enumerate(rows):
        if has_pairs:
            row.setdefault("text_pair", "")
        if labelled:
            where = f"Row {k} of {source.path!r}"
            parse = parse_number if regression else parse_class
            row["label"] = parse(row["label"], where)
    return rows


def parse_class(label: Any, where: str) -> str:
    """Return the characters of a label that names a class. A whole number such as 1.0 is 1.

    Raises:
        UserError: if the label is empty, a number that is not whole, a list or an object.
    """
    if isinstance(label, bool):
        return Unquoted("true" if label else "false")
    if isinstance(label, Unquoted):
        if INTEGER.fullmatch(label):
            return label
        value = Decimal(label)
        if value.is_finite() and value.adjusted() < 20 and value == value.to_integral_value():
            return Unquoted(int(value))
    elif isinstance(label, str) and label:
        return label
    raise UserError(
        f"{where}: label {label!r} is no class. Use whole numbers or names, or "
        "`regression: true` to predict numbers."
    )


def parse_number(label: Any, where: str) -> float:
    """Return the label of a regression as a number. A text that spells a number is one.

    Raises:
        UserError: if the label is no finite number.
    """
    spells_number = isinstance(label, str) and NUMBER.fullmatch(label.strip())
    value = float(label) if spells_number else math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{where}: label {label!r} is no number, and `regression` predicts one. Leave "
            "`regression` out for classes."
        )
    return value
