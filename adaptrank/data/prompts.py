"""Fill the format string of a run's prompts with a text that a person types."""

import string
from collections.abc import Mapping
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.columns import MisfitError, NullError, column_of, fill_template
from adaptrank.data.values import JSON, RepeatedKeyError, Unquoted


def gaps_of(template: str) -> list[str]:
    """Return the different gaps of a format string, such as ["question"], or [] if it has none.

    Raises:
        UserError: if it is no format string.
    """
    gaps = []
    for _, gap, spec in _parts(template):
        if gap is not None:
            # A format may have gaps of its own, as in {price:{width}}.
            gaps += [gap, *gaps_of(spec)]
    return list(dict.fromkeys(gaps))


def fill_prompt(template: str, typed: str | Mapping[str, object]) -> str:
    """Return the prompt that training would have made of what a person typed.

    The same code fills the templates of training. So `{price:.2f}` is formatted, `{options[a]}`
    reaches inside of a column, and nothing is evaluated. A text that begins and ends as the format
    does is a whole prompt already, and returned as it is.

    Args:
        template: the format string, such as "Question: {question}\\nAnswer:".
        typed: the text of the only gap, a whole prompt, or {column: value}.

    Raises:
        UserError: if a gap has no value, or one that does not fit.
    """
    gaps = gaps_of(template)
    if isinstance(typed, str):
        if not gaps or _is_filled(template, typed):
            return typed
        if len(gaps) > 1:
            example = "{" + ", ".join(f'"{gap}": "..."' for gap in gaps) + "}"
            raise UserError(
                f"The format of the training prompts is {template!r}. Give its {len(gaps)} texts "
                f"as JSON, {example}, or give a whole prompt with --raw."
            )
        typed = dict.fromkeys(gaps, typed)
    format_said = f"The format of the training prompts is {template!r}."
    missing = [gap for gap in gaps if gap not in typed and column_of(gap) not in typed]
    if missing:
        raise UserError(
            f"{format_said} The text for {missing[0]!r} is missing, and only "
            f"{sorted(map(str, typed))} arrived. Give it, or give a whole prompt with --raw."
        )
    try:
        return fill_template(template, {str(key): _as_read(typed[key]) for key in typed})
    except NullError as error:
        raise UserError(
            f"{format_said} The value for {error} is null. Give a text, or give a whole prompt "
            "with --raw."
        ) from error
    except MisfitError as error:
        raise UserError(f"{format_said} It does not fit what arrived: {error}.") from error


def read_columns(text: str) -> dict[str, Any] | None:
    """Return the columns of a JSON object, with the characters of its numbers, or None.

    Raises:
        UserError: if two values have one name.
    """
    try:
        value = JSON.decode(text)
    except RepeatedKeyError as error:
        raise UserError(f"{text[:40]!r} cannot be read as JSON: {error}.") from error
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _as_read(value: Any) -> Any:
    """Return a value as the readers of files return it, with a number as its characters."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Unquoted(value) if is_number else value


def _parts(template: str) -> list[tuple[str, str | None, str]]:
    """Split a format string into (text, gap after it or None, format of the gap)."""
    try:
        return [
            (text, gap, spec or "") for text, gap, spec, _ in string.Formatter().parse(template)
        ]
    except ValueError as error:
        raise UserError(f"{template!r} is no format string ({error}).") from error


def _is_filled(template: str, typed: str) -> bool:
    """Tell whether a text begins and ends with the fixed texts of a format string."""
    parts = _parts(template)
    with_gap = [k for k, (_, gap, _) in enumerate(parts) if gap is not None]
    first = "".join(text for text, _, _ in parts[: with_gap[0] + 1])
    last = "".join(text for text, _, _ in parts[with_gap[-1] + 1 :])
    is_long_enough = len(typed) >= len(first) + len(last) > 0
    return is_long_enough and typed.startswith(first) and typed.endswith(last)
