"""Record how training made prompts of columns, so that `generate` reads files in the same way."""

from collections.abc import Mapping, Sequence

from adaptrank.data.columns import column_of
from adaptrank.data.formats import CONVERSATION_COLUMNS
from adaptrank.data.prompts import gaps_of
from adaptrank.data.sources import Source

Way = Mapping[str, str | bool]
"""How prompts are made of columns: {field of `Source`: its value}."""

PROMPT_FIELDS = ("prompt", "messages", "tools", "system", "format", "null_is_empty")
"""Fields of a source that change its prompts."""

KNOWN_COLUMNS = ("prompt", *CONVERSATION_COLUMNS, "instruction")
"""Columns that are read without any setting."""


MOST_WAYS = 64
"""Most ways that an adapter's file may record."""


def prompt_columns(sources: Sequence[Source]) -> list[dict[str, str | bool]]:
    """Return the different ways in which sources make prompts, or [] without any setting."""
    ways: list[dict[str, str | bool]] = []
    for source in sources:
        # Plain text has no prompts.
        if source.format == "text" or source.text is not None:
            continue
        way = {}
        for field in PROMPT_FIELDS:
            value = getattr(source, field)
            if value is not None and value is not False and value != "auto":
                way[field] = value
        if way not in ways:
            ways.append(way)
    return ways if any(ways) and len(ways) <= MOST_WAYS else []


def fits_columns(way: Way, columns: Sequence[str]) -> bool:
    """Tell whether a table has the columns that a way of making prompts reads."""
    templates = [str(way[field]) for field in ("prompt", "messages") if field in way]
    if templates:
        return all(_has_columns(template, columns) for template in templates)
    by_format: dict[str | bool, tuple[str, ...]] = {
        "sharegpt": CONVERSATION_COLUMNS,
        "openai": CONVERSATION_COLUMNS,
        "alpaca": ("instruction",),
        "prompt_completion": ("prompt",),
    }
    needed = by_format.get(way.get("format", ""), KNOWN_COLUMNS)
    return any(column in columns for column in needed)


def _has_columns(template: str, columns: Sequence[str]) -> bool:
    """Tell whether a table has all columns of a field: those of a format string, or one by name."""
    if not template or template in columns:
        return True
    gaps = gaps_of(template)
    return bool(gaps) and all(gap in columns or column_of(gap) in columns for gap in gaps)
