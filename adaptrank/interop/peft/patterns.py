"""Patterns of paths in a PEFT configuration: those that cannot take long to match."""

import re
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LONGEST_PATTERN = 1000

MOST_REPEATS = 3
"""Largest number of repetitions in a pattern. Each multiplies the time by the length of a path."""

_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)
_PLAIN = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT)


def is_quick_pattern(pattern: str) -> bool:
    """Return whether a regular expression matches any path in little time.

    PEFT writes names and whole paths. People write patterns such as `layers\\.\\d+\\..*q_proj`.
    Only a single character may be repeated, and not a group or another repetition.
    """
    if len(pattern) > LONGEST_PATTERN:
        return False
    try:
        parsed = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    repeats = _count_repeats(parsed)
    return repeats is not None and repeats <= MOST_REPEATS


def _count_repeats(parsed: Any) -> int | None:
    """Return the number of repetitions in a parsed pattern, or None if it has anything else."""
    total = 0
    for code, argument in parsed:
        inner: int | None = 0
        if code in _REPEATS:
            _, _, repeated = argument
            is_character = len(repeated) == 1 and repeated[0][0] in _PLAIN
            inner = 1 if is_character else None
        elif code is codes.SUBPATTERN:
            inner = _count_repeats(argument[-1])
        elif code is codes.BRANCH:
            counts = [_count_repeats(branch) for branch in argument[1]]
            inner = None if None in counts else sum(count or 0 for count in counts)
        elif code not in _PLAIN:
            inner = None
        if inner is None:
            return None
        total += inner
    return total
