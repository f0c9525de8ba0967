"""Changes of plain configurations: tables laid over tables, texts replaced, values set."""

from collections.abc import Callable, Mapping
from typing import Any

from adaptrank._errors import UserError

Config = dict[str, Any]
"""A configuration of `fit`, or a part of one, as YAML holds it."""


def plain_copy(value: Any) -> Any:
    """Return a copy of plain data in which no two places share a table or a list.

    An anchor of YAML stands for one object in several places.
    """
    if isinstance(value, Mapping):
        return {key: plain_copy(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain_copy(entry) for entry in value]
    return value


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> Config:
    """Return the base with an overlay laid over it.

    Tables are merged key by key. Lists and all other values are replaced. A table with another
    `class_path` replaces the whole table, as the arguments belong to the old class.
    """
    result: Config = plain_copy(base)
    for key, value in overlay.items():
        current = result.get(key)
        if (
            isinstance(current, dict)
            and isinstance(value, dict)
            and not _other_class(current, value)
        ):
            result[key] = merge(current, value)
        else:
            result[key] = plain_copy(value)
    return result


def _other_class(current: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return "class_path" in value and value["class_path"] != current.get("class_path")


def map_texts(value: Any, change: Callable[[str], Any]) -> Any:
    """Return plain data with every text in its values changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_texts(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [map_texts(entry, change) for entry in value]
    return value


def contains(value: Any, word: str) -> bool:
    """Return whether a word is a part of any text in the values of plain data."""
    if isinstance(value, str):
        return word in value
    if isinstance(value, Mapping):
        return any(contains(entry, word) for entry in value.values())
    if isinstance(value, list):
        return any(contains(entry, word) for entry in value)
    return False


def set_at(config: Config, key: str, value: Any) -> Config:
    """Return a copy of the configuration with a value at a dotted path. Missing tables are made.

    Raises:
        UserError: if a component of the path is no table.
    """
    result: Config = plain_copy(config)
    *tables, last = key.split(".")
    table: Any = result
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(
                f"{key!r} leads through {name!r}, which is no table in this configuration."
            )
    table[last] = value
    return result
