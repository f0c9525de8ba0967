"""Numbers of classes: their names, where these come from, and the class that a label names."""

import logging
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.class_names import show
from adaptrank.data.values import INTEGER, NUMBER, Unquoted, as_integer

log = logging.getLogger(__name__)

BOOLEANS = ("false", "true")
"""Words without quotes that are labels. The index of each is its class where names are given."""


class ClassIndex:
    """Names of the classes of some data, and the class that a label names.

    A label is the characters in the data. It is a name, or the characters of an index.

    Args:
        names: names in the order of their indices, or None to find them later.

    Raises:
        UserError: if two classes have one name.
    """

    def __init__(self, names: list[str] | None) -> None:
        if names is not None and len(set(names)) < len(names):
            raise UserError(f"`classes` {names} names a class twice. Give different names.")
        self.names = names
        # Label -> index, where the labels of the rows themselves are the names.
        self._index_of_label: dict[str, int] | None = None

    def find(
        self,
        declared: Callable[[], list[str] | None],
        labels: Callable[[], Sequence[str]],
    ) -> None:
        """Find the names of the classes, unless they are known.

        Args:
            declared: function that returns the names that the data declare, or None.
            labels: function that returns the labels of the training rows.
        """
        if self.names is not None:
            return
        self.names = declared()
        if self.names is None:
            self.names = sort_labels(list(dict.fromkeys(labels())))
            self._index_of_label = {label: i for i, label in enumerate(self.names)}

    def of_column(self, declared: list[str]) -> list[int]:
        """Return the index of each class that a column declares, by its name where all are known.

        Other names are for people, and then the column counts the classes as `names` does.

        Raises:
            UserError: if the column gives a class another number.
        """
        names = self.names or []
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

    def index(self, label: str, where: str, indices: list[int] | None = None) -> int:
        """Return the index of the class that a label names.

        Args:
            label: the characters of the label.
            where: place of the row, for the error.
            indices: label -> index, where the column of the labels declares its classes.

        Raises:
            UserError: if it names none.
        """
        names = self.names
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
