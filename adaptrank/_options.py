"""Numeric options: a range for each, and one sentence for a value outside of it.

Whether an option takes whole numbers is read from its annotation. A class states the range of an
option in `ranges`. No option takes a number that is not finite, and none takes True for 1.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, Union

from adaptrank._errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds.

    Args:
        low: lower bound, or None.
        high: upper bound, or None.
        open_low: whether the lower bound itself is out of range.
        open_high: whether the upper bound itself is out of range.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if self.low is not None and (value < self.low or (self.open_low and value == self.low)):
            return False
        if self.high is None:
            return True
        return value < self.high or (not self.open_high and value == self.high)

    def __str__(self) -> str:
        """Return the range in words, to follow "a number"."""
        words = []
        if self.low is not None:
            words.append(f"{'above' if self.open_low else 'from'} {self.low:g}")
        if self.high is not None:
            words.append(f"{'below' if self.open_high else 'up to'} {self.high:g}")
        return " and ".join(words)


ANY = Range()
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1)
"""At least one."""
DECAY = Range(0, 1, open_high=True)
"""A dropout, or the decay of a running average."""


def check_number(name: str, value: Any, allowed: Range = ANY, whole: bool = False) -> None:
    """Check one option.

    Args:
        name: the option, as the user writes it.
        value: its value.
        allowed: numbers that make sense.
        whole: whether it has to be a whole number.

    Raises:
        UserError: naming the option, the value and what fits.
    """
    kind: Any = Integral if whole else Real
    # True is an instance of both.
    fits = type(value) is not bool and isinstance(value, kind) and math.isfinite(value)
    if not fits or value not in allowed:
        fitting = f"{'a whole number' if whole else 'a number'} {allowed}".rstrip()
        raise UserError(f"{name}={value!r} makes no sense. Give {fitting}.")


def check_arguments(owner: type, arguments: Mapping[str, Any]) -> None:
    """Check every numeric argument of a constructor.

    The ranges are those in `ranges` of the class and its bases. An argument without a range has to
    be finite, and whole where its annotation says so.

    Args:
        owner: class whose constructor takes the arguments.
        arguments: name -> value.

    Raises:
        UserError: for the first value that makes no sense.
    """
    ranges = ranges_of(owner)
    for name, (whole, kinds) in numeric_options(owner).items():
        if name in arguments:
            _check_value(name, arguments[name], ranges.get(name, ANY), whole, kinds)


def ranges_of(owner: type) -> dict[str, Range]:
    """Return the ranges of a class and its bases. Those of a subclass replace those of a base."""
    ranges: dict[str, Range] = {}
    for base in reversed(owner.__mro__):
        ranges |= vars(base).get("ranges", {})
    return ranges


@cache
def numeric_options(owner: type) -> dict[str, tuple[bool, frozenset[type]]]:
    """Return the numeric arguments of a constructor: name -> whether whole, and the other kinds.

    Other kinds are types beside numbers, such as NoneType, list, dict and str.
    """
    constructor: Any = getattr(owner, "__init__")  # noqa: B009
    try:
        hints = typing.get_type_hints(constructor)
    except (NameError, TypeError):
        # An annotation of a user's class that cannot be resolved here.
        return {}
    options = {}
    for name in inspect.signature(constructor).parameters:
        numbers, others = _kinds(hints.get(name))
        if numbers:
            options[name] = (float not in numbers, frozenset(others))
    return options


def _kinds(hint: Any) -> tuple[set[type], set[type]]:
    """Return the number types in an annotation, and its other types.

    The numbers in a list or a dict count as the annotation's own.
    """
    numbers: set[type] = set()
    others: set[type] = set()
    alternatives = (
        typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    )
    for alternative in alternatives:
        container = typing.get_origin(alternative)
        if alternative in (int, float):
            numbers.add(alternative)
        elif container is typing.Literal:
            choices = {type(choice) for choice in typing.get_args(alternative)}
            others |= choices - {int, float}
        elif isinstance(container, type):
            of_members, _ = _kinds((typing.get_args(alternative) or (None,))[-1])
            numbers |= of_members
            others.add(container)
        elif isinstance(alternative, type):
            others.add(alternative)
    return numbers, others


def _check_value(name: str, value: Any, allowed: Range, whole: bool, kinds: Iterable[type]) -> None:
    """Check a value that is a number, or of one of the other kinds, which may hold numbers."""
    for kind in kinds:
        if not isinstance(value, kind):
            continue
        members: Iterable[Any] = ()
        if isinstance(value, Mapping):
            members = value.values()
        elif isinstance(value, list | tuple):
            members = value
        for member in members:
            check_number(name, member, allowed, whole)
        return
    check_number(name, value, allowed, whole)


class OptionsFit(Exception):  # noqa: N818
    """Signal that a constructor was only asked about its options, and that they fit."""


class OptionProbe:
    """Stand in for a layer while the options of a method are checked, before there is a model."""


def check_maker(make: Callable[[Any], Any]) -> None:
    """Check the options that a maker of wrappers holds, without building anything.

    The constructor checks its options first, and stops there when it is given an `OptionProbe`. A
    maker that looks at its layer fails on the probe. Its options are checked when it is called
    for a layer.

    Args:
        make: layer -> wrapper: a class, a partial, or any function.

    Raises:
        UserError: for an option that makes no sense.
    """
    try:
        make(OptionProbe())
    except UserError:
        raise
    except Exception:
        return
