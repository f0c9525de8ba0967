"""Arguments of a method as a file has them, held against the signature of its constructor."""

import inspect
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError, did_you_mean, some
from adaptrank.parameterizations import Parameterization


def check_arguments(
    method: type[Parameterization], arguments: Mapping[str, Any], limit: int, file: Path
) -> None:
    """Refuse arguments that the constructor does not have, of another type, or absurdly large.

    Args:
        method: the class.
        arguments: name -> value, plain data.
        limit: largest absolute value of a whole number.
        file: for error messages.
    Raises:
        UserError: names the argument.
    """
    known = _annotations(method)
    for name, value in arguments.items():
        if name not in known:
            raise UserError(
                f"{file} gives {method.__name__} the argument {name!r}, which it does not have."
                f"{did_you_mean(name, known)}"
            )
        if not _fits(value, known[name]):
            raise UserError(
                f"{file} gives {method.__name__} {name}={_short(value)}, which should be "
                f"{_spell(known[name])}."
            )
        _check_counts(value, limit, method.__name__, file)


@cache
def _annotations(method: type[Parameterization]) -> dict[str, Any]:
    """Return name -> annotation of the arguments that a file records."""
    constructor = method.__init__
    parameters = list(inspect.signature(constructor).parameters.values())[2:]
    try:
        hints = typing.get_type_hints(constructor)
    except Exception:
        # A class of the user may have annotations that do not resolve here.
        hints = {}
    return {parameter.name: hints.get(parameter.name, Any) for parameter in parameters}


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether plain data are of the annotated type. An unknown annotation fits all."""
    origin, choices = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in choices)
    if list in (origin, annotation):
        is_list = isinstance(value, list)
        return is_list and all(_fits(item, choices[0]) for item in value if choices)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    if annotation in (int, bool, str, type(None)):
        return type(value) is annotation
    return True


def _check_counts(value: Any, limit: int, method: str, file: Path) -> None:
    """Refuse a whole number far beyond the layer's own size."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_counts(item, limit, method, file)
    elif isinstance(value, int) and abs(value) > limit:
        raise UserError(
            f"{file} asks for a {method} with {value:,}, and the layer has {limit // 4:,} numbers; "
            f"it is damaged, or meant to harm."
        )


def _spell(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words[type(None)] = "null"
    origin, choices = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(choice) for choice in choices)
    if origin is typing.Literal:
        return some(map(repr, choices))
    return words.get(annotation, "a list")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
