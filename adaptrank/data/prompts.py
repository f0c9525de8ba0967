"""Fill the format string of a run's prompts with a text that a person types."""

import string
from collections.abc import Mapping

from adaptrank._errors import UserError


def gaps_of(template: str) -> list[str]:
    """Return the different gaps of a format string, such as ["question"], or [] if it has none.

    Raises:
        UserError: if it is no format string.
    """
    return list(dict.fromkeys(gap for _, gap in _parts(template) if gap is not None))


def fill_prompt(template: str, typed: str | Mapping[str, object]) -> str:
    """Return the prompt that training would have made of what a person typed.

    Nothing is evaluated: a gap is replaced by the text for it. A text that begins and ends as the
    format does is a whole prompt already, and returned as it is.

    Args:
        template: the format string, such as "Question: {question}\\nAnswer:".
        typed: the text of the only gap, a whole prompt, or {gap: text}.

    Raises:
        UserError: if a gap has no text.
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
    missing = [gap for gap in gaps if gap not in typed]
    if missing:
        raise UserError(
            f"The format of the training prompts is {template!r}. The text for {missing[0]!r} is "
            f"missing, and only {sorted(map(str, typed))} arrived. Give it, or give a whole prompt "
            f"with --raw."
        )
    return "".join(text if gap is None else f"{text}{typed[gap]}" for text, gap in _parts(template))


def _parts(template: str) -> list[tuple[str, str | None]]:
    """Split a format string into (text, gap after it, or None)."""
    try:
        return [(text, gap) for text, gap, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"{template!r} is no format string ({error}).") from error


def _is_filled(template: str, typed: str) -> bool:
    """Tell whether a text begins and ends with the fixed texts of a format string."""
    parts = _parts(template)
    with_gap = [k for k, (_, gap) in enumerate(parts) if gap is not None]
    first = "".join(text for text, _ in parts[: with_gap[0] + 1])
    last = "".join(text for text, _ in parts[with_gap[-1] + 1 :])
    is_long_enough = len(typed) >= len(first) + len(last) > 0
    return is_long_enough and typed.startswith(first) and typed.endswith(last)
