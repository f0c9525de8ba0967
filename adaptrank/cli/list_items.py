"""Options that change one item of a list: `--model.adapters.0.rank 8`.

jsonargparse takes a list as a whole, or appends to it. So such an option becomes the option of the
whole list, with the item changed. The list is the one that the options before it gave.
"""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from adaptrank._errors import UserError
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.given import read_node
from adaptrank.cli.signatures import accepts
from adaptrank.studies import Config, Place, find_place, merge, set_place, spell_place, value_at


def expand_items(args: Sequence[str]) -> list[str]:
    """Return the command line with a whole list in place of an option for one of its items.

    Raises:
        ConfigError: if there is no such list, or no such item.
    """
    words = list(args)
    if not any(_names_item(word.partition("=")[0]) for word in words):
        return words
    config: Config = {}
    expanded: list[str] = []
    while words:
        option = words.pop(0)
        name, equals, value = option.partition("=")
        has_value = bool(equals)
        if not equals and name.startswith("-") and words and not words[0].startswith("--"):
            value, has_value = words.pop(0), True
        if name in ("--config", "-c") and has_value:
            config = merge(config, _table(value))
        elif _names_item(name) and has_value:
            config, option, value = _whole_list(config, name, value)
            equals = ""
        elif name.startswith("--") and has_value:
            config = _with_option(config, name, value)
        expanded.append(option)
        if has_value and not equals:
            expanded.append(value)
    return expanded


def _names_item(option: str) -> bool:
    """Tell whether an option names an item of a list by its position."""
    return option.startswith("--") and any(part.isdigit() for part in option.split(".")[1:])


def _table(file: str) -> Config:
    """Return the content of a configuration file."""
    content: Config = yaml.SafeLoader("").construct_object(read_node(file), deep=True)
    return content


def _with_option(config: Config, option: str, text: str) -> Config:
    """Return the configuration with an option, as far as it leads to a place."""
    try:
        return set_place(config, find_place(config, option.removeprefix("--")), _value(text))
    except (UserError, TypeError, KeyError):
        # The parser says what is wrong with it.
        return config


def _whole_list(config: Config, option: str, text: str) -> tuple[Config, str, str]:
    """Return the configuration with an item changed, and the option of its whole list.

    Returns:
        The configuration, the option, and its value as JSON, which is YAML as well.
    """
    try:
        place = find_place(config, option.removeprefix("--"), accepts)
        changed = set_place(config, place, _value(text))
    except UserError as error:
        raise ConfigError(f"{option}: {error}") from None
    outer = _list_of(place)
    if not outer:
        key = option.removeprefix("--")
        around = key[: next(i for i, c in enumerate(key) if c.isdigit())].rstrip(".")
        raise ConfigError(
            f"{option}: there is no list {around!r} before this option. Give --config FILE first, "
            f"or the whole list, as in --{around} '[...]'."
        )
    items = value_at(changed, outer)
    names = [part for part in outer if part != "init_args"]
    return changed, f"--{spell_place(tuple(names))}", json.dumps(items)


def _list_of(place: Place) -> Place:
    """Return the place of the outermost list on the way to a place, or () if there is none."""
    for position, part in enumerate(place):
        if isinstance(part, int):
            return place[:position]
    return ()


def _value(text: str) -> Any:
    """Return the value of an option as YAML has it, and 1e-4 as a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
