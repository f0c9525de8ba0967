"""Places in a plain configuration, named by short keys such as `model.adapters.0.rank`.

A key is a path with dots. The levels `class_path` and `init_args` may be left out, and a number
is a place in a list. The last name may stand deeper, if one value under the path has it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from adaptrank._errors import UserError, some
from adaptrank.studies.overlays import Config, plain_copy

Place = tuple[str | int, ...]
"""Full path of a value: names of tables and positions in lists."""

Accepts = Callable[[str, str], bool]
"""(class, argument) -> whether the constructor of the class takes the argument."""


def spell_place(place: Place) -> str:
    """Return a place as a key with dots."""
    return ".".join(map(str, place))


def find_place(config: Config, key: str, accepts: Accepts | None = None) -> Place:
    """Return the full path of a key in a configuration. A new last name is allowed in a table.

    Args:
        config: the configuration.
        key: the key, whole or short.
        accepts: tells which class takes an argument that the configuration does not hold yet.

    Raises:
        UserError: if the key leads through a value without parts, past the end of a list, or to
            several values.
    """
    place: Place = ()
    node: Any = config
    parts = key.split(".")
    for position, part in enumerate(parts):
        step = _step(node, part, key)
        if step is None:
            return place + _below(node, parts[position:], key, place, accepts)
        place += step
        for name in step:
            node = node[name]
    return place


def _step(node: Any, part: str, key: str) -> Place | None:
    """Return the path of one part of a key from a node, or None if the node does not have it."""
    if isinstance(node, list) and part.lstrip("-").isdigit():
        position = int(part)
        if not 0 <= position < len(node):
            raise UserError(
                f"{key!r}: the list there has {len(node)} item(s), counted from 0, and no item "
                f"{position}."
            )
        return (position,)
    if not isinstance(node, dict):
        return None
    if part in node:
        return (part,)
    arguments = node.get("init_args")
    if isinstance(arguments, dict) and part in arguments:
        return ("init_args", part)
    return None


def _below(
    node: Any, parts: Sequence[str], key: str, place: Place, accepts: Accepts | None
) -> Place:
    """Return the path of the rest of a key that a node does not have itself."""
    *_, last = parts
    is_own = accepts is not None and _takes(node, last, accepts)
    if len(parts) == 1 and place and not is_own:
        deeper = [path for path in _paths(node) if path[-1] == last]
        if not deeper and accepts is not None:
            deeper = [(*path, last) for path in _classes_with(node, last, accepts)]
        if len(deeper) == 1:
            return deeper[0]
        if deeper:
            keys = [spell_place((*place, *path)) for path in deeper]
            raise UserError(f"{key!r} may be {some(keys, 4)}. Write one of them.")
    if isinstance(node, str):
        return ("init_args", *parts)
    if not isinstance(node, dict):
        found = f"{spell_place(place)!r} is {node!r}" if place else "the configuration is empty"
        raise UserError(f"{key!r} leads nowhere: {found}.")
    is_class = "class_path" in node or "init_args" in node
    return ("init_args", *parts) if is_class else tuple(parts)


def _takes(node: Any, argument: str, accepts: Accepts) -> bool:
    """Tell whether a node itself names a class with this argument."""
    name = _class_name(node)
    return name is not None and accepts(name, argument)


def _class_name(node: Any) -> str | None:
    """Return the class that a node names, by its `class_path` or as a text, or None."""
    if isinstance(node, dict):
        node = node.get("class_path")
    return node if isinstance(node, str) else None


def _paths(node: Any) -> Iterator[Place]:
    """Yield the paths of all values under a node that stand under a name."""
    for name, child in _children(node):
        if isinstance(name, str) and name not in ("class_path", "init_args"):
            yield (name,)
        for path in _paths(child):
            yield (name, *path)


def _children(node: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def _classes_with(node: Any, argument: str, accepts: Accepts) -> Iterator[Place]:
    """Yield the paths of the arguments of all classes under a node that take an argument."""
    for name, child in _children(node):
        if name != "class_path" and _takes(child, argument, accepts):
            yield (name, "init_args")
        for path in _classes_with(child, argument, accepts):
            yield (name, *path)


def set_place(config: Config, place: Place, value: Any) -> Config:
    """Return a copy of the configuration with a value at a place. Missing tables are made.

    A class that stands there as a text becomes a table where it gets an argument.
    """
    result: Config = plain_copy(config)
    node: Any = result
    *tables, last = place
    for name in tables:
        if isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
        child = node[name]
        if isinstance(child, str):
            child = node[name] = {"class_path": child}
        node = child
    node[last] = plain_copy(value)
    return result


def value_at(config: Any, place: Place) -> Any:
    """Return the value at a place."""
    for name in place:
        config = config[name]
    return config


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest name of each key that no other key has: its last parts."""
    names: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        others = [other.split(".") for other in keys if other != key]
        length = 1
        while length < len(parts) and any(o[-length:] == parts[-length:] for o in others):
            length += 1
        names[key] = ".".join(parts[-length:])
    return names
