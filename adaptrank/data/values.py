"""Values of data files as the characters that stand in the file.

A value is a text, an `Unquoted`, True, False, None, or a list or a dictionary of values.
"""

import json
import re
from typing import Any

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""A decimal number."""

INTEGER = re.compile(r"0|-?[1-9]\d{0,99}", re.ASCII)
"""An integer in the one way in which a program writes it: no sign, zero or space in front."""


class Unquoted(str):
    """Characters of a number that stands in a file without quotes, such as 1.10 in JSON.

    They are never rounded, and their number of digits has no limit. A label without quotes may be
    an index, and a quoted one is a name.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class RepeatedKeyError(ValueError):
    """A JSON object has two values under one key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"it has two values for {repeated!r}")
    return result


JSON = json.JSONDecoder(
    parse_float=Unquoted, parse_int=Unquoted, parse_constant=Unquoted, object_pairs_hook=_object
)
"""Decoder of JSON that keeps the characters of numbers."""


def as_text(value: Any) -> str:
    """Return the characters of a value.

    Raises:
        TypeError: if the value is null, a list or an object.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return str(value)
    kinds = {type(None): "null", list: "a list", dict: "an object"}
    raise TypeError(f"{kinds.get(type(value), type(value).__name__)} is no text")


def as_integer(value: Any) -> int | None:
    """Return the integer that a value spells, or None if it spells none."""
    if isinstance(value, str) and INTEGER.fullmatch(value) and len(value) < 20:
        return int(value)
    return None


def as_plain(value: Any) -> Any:
    """Return a value with numbers in place of their characters, as a JSON parser returns it."""
    if isinstance(value, Unquoted):
        return int(value) if INTEGER.fullmatch(value) else float(value)
    if isinstance(value, list):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return value
