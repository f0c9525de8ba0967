"""Record how training made prompts of columns, so that `generate` reads files in the same way."""

from collections.abc import Mapping, Sequence

from adaptrank.data.columns import column_of
from adaptrank.data.formats import CONVERSATION_COLUMNS
from adaptrank.data.prompts import gaps_of
from adaptrank.data.sources import Source

PromptSettings = Mapping[str, str | bool]
"""How prompts are made of columns: {field of `Source`: its value}."""

PROMPT_FIELDS = ("prompt", "messages", "tools", "system", "format", "null_is_empty")
"""Fields of a source that change its prompts."""

KNOWN_COLUMNS = ("prompt", *CONVERSATION_COLUMNS, "instruction")
"""Columns that are read without any setting."""


MOST_RECORDED = 64
"""Most settings that an adapter's file may record."""


def prompt_columns(sources: Sequence[Source]) -> list[dict[str, str | bool]]:
    """Return the different settings by which sources make prompts, or [] without any."""
    recorded: list[dict[str, str | bool]] = []
    for source in sources:
        # Plain text has no prompts.
        if source.format == "text" or source.text is not None:
            continue
        settings = {}
        for field in PROMPT_FIELDS:
            value = getattr(source, field)
            if value is not None and value is not False and value != "auto":
                settings[field] = value
        if settings not in recorded:
            recorded.append(settings)
    return recorded if any(recorded) and len(recorded) <= MOST_RECORDED else []


def fits_columns(settings: PromptSettings, columns: Sequence[str]) -> bool:
    """Tell whether a table has the columns that such settings read."""
    templates = [str(settings[field]) for field in ("prompt", "messages") if field in settings]
    if templates:
        return all(_has_columns(template, columns) for template in templates)
    by_format: dict[str | bool, tuple[str, ...]] = {
        "sharegpt": CONVERSATION_COLUMNS,
        "openai": CONVERSATION_COLUMNS,
        "alpaca": ("instruction",),
        "prompt_completion": ("prompt",),
    }
    needed = by_format.get(settings.get("format", ""), KNOWN_COLUMNS)
    return any(column in columns for column in needed)


def _has_columns(template: str, columns: Sequence[str]) -> bool:
    """Tell whether a table has all columns of a field: those of a format string, or one by name."""
    if not template or template in columns:
        return True
    gaps = gaps_of(template)
    return bool(gaps) and all(gap in columns or column_of(gap) in columns for gap in gaps)
