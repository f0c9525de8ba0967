"""Tools and calls of tools, from the forms in which files hold them."""

import json
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.values import JSON, RepeatedKeyError, Unquoted, as_plain

Call = dict[str, Any]
"""{"type": "function", "function": {"name": ..., "arguments": ...}}, with an `id` where it has one.

Arguments are an object, or the text of one in JSON.
"""


def decoded(value: Any, what: str) -> Any:
    """Return a value, or what its text means as JSON.

    Args:
        value: a value of a file, which may hold lists and objects as texts.
        what: the value in words, for the error.

    Raises:
        UserError: if a text is no JSON.
    """
    if not isinstance(value, str) or isinstance(value, Unquoted):
        return value
    try:
        return JSON.decode(value.strip())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is {value[:40]!r}, which is no JSON ({error}).") from error


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at every depth.

    Parquet and Arrow give every object of a column the keys of all of them.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def read_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the tools that a conversation may use, as JSON values.

    Args:
        value: a list of objects, the same as text, or null.
        where: place of the row, for the error.

    Raises:
        UserError: if it is something else.
    """
    if value in (None, ""):
        return []
    tools = decoded(value, f"{where}: tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{where}: tools is {repr(value)[:40]}, and not a list of functions such as "
            '[{"type": "function", "function": {"name": "...", "parameters": {}}}].'
        )
    return [as_plain(tool) for tool in tools]


def read_calls(value: Any, where: str) -> list[Call]:
    """Return the `tool_calls` of a turn, with their own keys.

    Args:
        value: a list of calls, or the same as text.
        where: place of the turn, for errors.

    Raises:
        UserError: if it is something else, or a number in arguments would lose digits.
    """
    calls = decoded(value, f"{where}: tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: tool_calls is {repr(value)[:40]}, and not a list of calls.")
    return [_read_call(call, where) for call in calls]


def _read_call(call: Call, where: str) -> Call:
    """Return a call whose arguments, here or under `function`, are exact."""
    read: Call = {}
    for key, value in call.items():
        if key == "arguments":
            read[key] = exact_arguments(value, where)
        elif key == "function" and isinstance(value, dict):
            read[key] = _read_call(value, where)
        else:
            read[key] = as_plain(value)
    return read


def read_function_calls(value: Any, where: str) -> list[Call]:
    """Return the calls that a turn of ShareGPT makes, in the form of `tool_calls`.

    Args:
        value: {"name": ..., "arguments": ...}, a list of them, or the same as text.
        where: place of the turn, for errors.

    Raises:
        UserError: if a call has no name, or a number in arguments would lose digits.
    """
    calls = decoded(value, f"{where}: the call of a tool")
    functions = calls if isinstance(calls, list) else [calls]
    for function in functions:
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where} calls a tool by {repr(function)[:40]}, which has no name. Write "
                '{"name": "...", "arguments": {}}.'
            )
    return [{"type": "function", "function": _read_call(f, where)} for f in functions]


def exact_arguments(arguments: Any, where: str) -> Any:
    """Return arguments as JSON values. The text of an object stays a text.

    Raises:
        UserError: if a number has digits that its JSON value would not be written with, or if a
            key has two values.
    """
    if not isinstance(arguments, str) or isinstance(arguments, Unquoted):
        _check_numbers(arguments, where)
        return as_plain(arguments)
    try:
        _check_numbers(JSON.decode(arguments.strip()), where)
    except RepeatedKeyError as error:
        raise UserError(
            f"{where}: the arguments of a tool are unclear, because {error}."
        ) from error
    except (json.JSONDecodeError, RecursionError):
        # No JSON. The chat template gets the text.
        pass
    return str(arguments)


def _check_numbers(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _check_numbers(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item, where)
    elif isinstance(value, Unquoted):
        written = json.dumps(as_plain(value))
        if written != value:
            raise UserError(
                f"{where}: the number {value} in the arguments of a tool would be written as "
                f"{written} by a chat template. Write it so, or as a text in quotes."
            )
