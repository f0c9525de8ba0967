"""JSON from strangers: plain data, or the reason why a text is refused."""

import json
import math
from typing import Any

LONGEST_TEXT = 1 << 24
"""Largest number of characters."""

LARGEST_NUMBER = 1 << 63
"""Bound on whole numbers."""


class JsonError(ValueError):
    """A text that is no JSON, or JSON that nobody would write."""


def parse_json(text: str) -> Any:
    """Return the data of a JSON text.

    Raises:
        JsonError: for anything that is no JSON, for a key that is there twice, and for a number
            that is not finite or has more digits than a 64-bit integer.
    """
    if len(text) > LONGEST_TEXT:
        raise JsonError(f"it has {len(text):,} characters")
    try:
        return json.loads(
            text,
            object_pairs_hook=_table,
            parse_constant=_constant,
            parse_int=_whole_number,
            parse_float=_number,
        )
    except (json.JSONDecodeError, RecursionError):
        raise JsonError("it is no JSON") from None


def is_plain_text(value: Any, longest: int = 1024) -> bool:
    """Return whether a value is short text that prints on one line."""
    return isinstance(value, str) and len(value) <= longest and (not value or value.isprintable())


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise JsonError("it has a key twice")
    return table


def _constant(word: str) -> Any:
    raise JsonError(f"it holds {word}, which is no number")


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= LARGEST_NUMBER:
        raise JsonError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError("it holds a number that is not finite")
    return value
