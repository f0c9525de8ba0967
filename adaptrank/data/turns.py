"""Turns of conversations as chat templates read them, from the forms in which files hold them.

A turn of OpenAI is {"role", "content"}, and a turn of ShareGPT is {"from", "value"}.
"""

from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.tool_calls import decoded, read_calls, read_function_calls
from adaptrank.data.values import as_plain, as_text

Turn = dict[str, Any]
"""One turn of a conversation: {"role": ..., "content": ...} and further keys.

`content` is a text, or in a tool's turn perhaps an object. `tool_calls` is a list that is not
empty. `weight` is 0 on a turn of the assistant that is context only. No key is null.
"""

CALL = "function_call"

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "function_call": CALL,
    "tool_call": CALL,
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
}
"""`from` of a turn of ShareGPT -> its role."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles of OpenAI. A chat template may know others."""

FLAGS = ("weight", "train", "training")
"""Keys of a turn that say whether it is trained on."""

DETAILS = ("train_detail", "training_detail")
"""Keys of a turn that choose parts of it."""

EXAMPLE = '{"role": "user", "content": "..."}'


def read_turns(
    value: Any, where: str, *, form: str | None = None, null_is_empty: bool | None = False
) -> list[Turn]:
    """Return the turns of a conversation, whose texts are the characters in the data.

    Args:
        value: a list of turns, or the same as JSON text.
        where: place of the row, for errors.
        form: "openai" or "sharegpt", or None if the keys of each turn decide.
        null_is_empty: a null in place of a text is the empty text. None means that nothing can set
            it, as in `generate`.

    Raises:
        UserError: if there is no list of turns, or if a turn is of another form, has an unknown
            role in the form of ShareGPT, or has a flag, a content or a call that cannot be read.
    """
    turns = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        turns = decoded(value, f"{where}: messages")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: messages is no list of turns such as {EXAMPLE}.")
    return [_read_turn(turn, where, k, form, null_is_empty) for k, turn in enumerate(turns)]


def _read_turn(turn: Any, where: str, k: int, form: str | None, null_is_empty: bool | None) -> Turn:
    """Return one turn."""
    place = f"{where}: turn {k}"
    is_sharegpt = isinstance(turn, dict) and "from" in turn and "role" not in turn
    if not is_sharegpt and not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
        keys = f" Its keys are {list(turn)}." if isinstance(turn, dict) else ""
        raise UserError(f"{place} of messages has no role.{keys} Write {EXAMPLE}.")
    if form is not None and is_sharegpt != (form == "sharegpt"):
        key, fitting = ("from", "sharegpt") if is_sharegpt else ("role", "openai")
        raise UserError(
            f"{place} of messages has a key {key!r}, and the format is {form}. Set format: "
            f"{fitting}, or leave `format` out."
        )
    if is_sharegpt:
        turn = _as_openai(turn, place)
    return _settle(turn, f"{where}: the content of turn {k}", place, null_is_empty)


def _as_openai(turn: Turn, place: str) -> Turn:
    """Return a turn of ShareGPT in the form of OpenAI."""
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        known = list(SHAREGPT_ROLES)
        raise UserError(
            f"{place} is from {turn['from']!r}, which is unknown. Use one of {', '.join(known)}."
            f"{did_you_mean(str(turn['from']), known)}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    value = turn["value"] if "value" in turn else turn.get("content")
    if role != CALL:
        return {**rest, "role": role, "content": value}
    return {
        **rest,
        "role": "assistant",
        "content": None,
        "tool_calls": read_function_calls(value, place),
    }


def _settle(turn: Turn, what: str, place: str, null_is_empty: bool | None) -> Turn:
    """Return a turn with its text, its calls and its flag in one form.

    Args:
        turn: a turn with a role.
        what: its content in words, for errors.
        place: the turn in words, for errors.
        null_is_empty: a null in place of a text is the empty text.
    """
    calls = _calls_of(turn, place)
    is_trained = _flag_of(turn, place)
    apart = ("content", "tool_calls", "function_call", *FLAGS, *DETAILS)
    settled = {
        key: as_plain(value)
        for key, value in turn.items()
        if value is not None and key not in apart
    }
    if turn["role"] == "function":
        # The earlier name of the role.
        settled["role"] = "tool"
    if calls:
        settled["tool_calls"] = calls
    settled["content"] = _text_of(turn, what, True if calls else null_is_empty)
    if settled["role"] == "assistant" and is_trained is False:
        settled["weight"] = 0
    elif settled["role"] != "assistant" and is_trained:
        raise UserError(
            f"{place} is trained on by its {'/'.join(_flags(turn))}, and its role is "
            f"{turn['role']!r}. Only turns of the assistant are trained on. Remove the key."
        )
    return settled


def _calls_of(turn: Turn, place: str) -> list[Turn]:
    """Return the calls of a turn, also of the earlier key `function_call`."""
    if turn.get("tool_calls"):
        return read_calls(turn["tool_calls"], place)
    if turn.get("function_call"):
        return read_function_calls(turn["function_call"], place)
    return []


def _flags(turn: Turn) -> list[str]:
    """Return the flags that a turn has."""
    return [key for key in FLAGS if turn.get(key) is not None]


def _flag_of(turn: Turn, place: str) -> bool | None:
    """Return whether a turn says that it is trained on, or None if it says nothing."""
    for key in DETAILS:
        if turn.get(key):
            raise UserError(
                f"{place} has a {key}, which chooses parts of a turn. A turn is trained on as a "
                "whole or not at all. Split it, or remove the key."
            )
    values = set()
    for key in _flags(turn):
        value = as_plain(turn[key])
        if value not in (0, 1):
            raise UserError(
                f"{place} has {key}={turn[key]!r}. Use 1 or true for a turn that is trained on, "
                "and 0 or false for one that is not."
            )
        values.add(bool(value))
    if len(values) > 1:
        raise UserError(f"{place} has {' and '.join(_flags(turn))} that disagree. Keep one.")
    return values.pop() if values else None


def _text_of(turn: Turn, what: str, may_be_null: bool | None) -> Any:
    """Return the content of a turn."""
    content = turn.get("content")
    if content is None:
        # A turn that calls a tool may say nothing.
        if not may_be_null:
            advice = "" if may_be_null is None else ", or set `null_is_empty: true`"
            raise UserError(f"{what} of messages is null. Remove or fill it{advice}.")
        return ""
    if isinstance(content, list):
        return "".join(_part(part, what) for part in content)
    if isinstance(content, dict) and turn["role"] == "tool":
        return as_plain(content)
    try:
        return as_text(content)
    except TypeError as error:
        raise UserError(f"{what} of messages: {error}. Write it as a text.") from error


def _part(part: Any, what: str) -> str:
    """Return the text of a part of a content."""
    if isinstance(part, str):
        return as_text(part)
    is_text = isinstance(part, dict) and part.get("type", "text") == "text"
    if not is_text or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UserError(
            f"{what} of messages has a part of type {kind!r}, and only parts of type 'text' are "
            "read. Remove the part or the row."
        )
    return as_text(part["text"])
