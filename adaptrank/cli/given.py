"""Find where the user wrote a value: the line of a configuration file, or an option."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adaptrank.cli.errors import ConfigError, Key, missing_file

# jsonargparse leaves these levels out when it names a key.
LEVELS = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True)
class Entry:
    """One value that the user wrote.

    Args:
        key: its full path.
        where: "FILE, line N" or "--option".
        value: the value as Python reads it.
    """

    key: Key
    where: str
    value: Any

    def names(self) -> tuple[str, ...]:
        """Return the key as jsonargparse names it: without positions in lists, without levels."""
        return tuple(part for part in self.key if isinstance(part, str) and part not in LEVELS)


def spell(key: Key) -> str:
    """Return a key as one writes it: `model.init_args.adapters[0].targets`."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def locate(args: Sequence[str], names: tuple[str, ...], value: str | None) -> Entry | None:
    """Return the entry of the command line that jsonargparse complains about, or None.

    Args:
        args: the command line, without its verb.
        names: keys around the value, outermost first, the value's own last. Some may be missing.
        value: the value as text, which tells entries with equal keys apart.
    """
    # The last file or option that gives a key counts.
    fitting = [_fitting(source, names) for source in reversed(sources(args))]
    for entries in fitting:
        for entry in entries:
            if value is not None and str(entry.value) == value:
                return entry
    return next((entries[0] for entries in fitting if entries), None)


def _fitting(source: list[Entry], names: tuple[str, ...]) -> list[Entry]:
    """Return the entries of a source that have the names, the outermost first."""
    return [entry for entry in source if _is_under(entry.names(), names)]


def _is_under(path: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Return True if a path ends in the last name and has the others before it, in order."""
    if not path or path[-1] != names[-1]:
        return False
    rest = iter(path)
    return all(name in rest for name in names)


def sources(args: Sequence[str]) -> list[list[Entry]]:
    """Return the entries of each configuration file and option, in the order of the command line.

    Raises:
        ConfigError: if a file is missing, is not YAML, or is not a mapping.
    """
    found = []
    rest = list(args)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if name in ("--config", "-c"):
            if value:
                found.append(list(_walk(read_node(value), (), value, None)))
        elif name.startswith("--"):
            found.append(list(_option(name, value)))
    return found


def _option(name: str, text: str) -> Iterator[Entry]:
    *parents, last = name.removeprefix("--").removesuffix("+").split(".")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    key = (*parents, last)
    if node is None:
        yield Entry(key, name, text)
    else:
        yield from _walk(node, key, name, 0)


def _walk(node: yaml.Node, key: Key, where: str, line: int | None) -> Iterator[Entry]:
    """Yield a node and all nodes under it. Files have lines, options (line 0) have none."""
    if key:
        place = f"{where}, line {line}" if line else where
        yield Entry(key, place, yaml.SafeLoader("").construct_object(node, deep=True))
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            below = 0 if line == 0 else name.start_mark.line + 1
            yield from _walk(child, (*key, str(name.value)), where, below)
    elif isinstance(node, yaml.SequenceNode):
        for position, child in enumerate(node.value):
            below = 0 if line == 0 else child.start_mark.line + 1
            yield from _walk(child, (*key, position), where, below)


def read_node(path: str) -> yaml.MappingNode:
    """Return a configuration file as YAML nodes, which know their lines.

    Raises:
        ConfigError: if the file is missing, is not YAML, or is not a mapping.
    """
    if not Path(path).is_file():
        raise ConfigError(missing_file(path, "configuration file"))
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file. A configuration is YAML.") from None
    except yaml.YAMLError as error:
        raise ConfigError(_broken_yaml(path, text, error)) from None
    if not isinstance(node, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a text"}
        kind = "nothing" if node is None else kinds[type(node)]
        raise ConfigError(
            f"{path} holds {kind}. A configuration is a mapping with model, data and trainer."
        )
    return node


def _broken_yaml(path: str, text: str, error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    reason = f"{problem} ({context})" if context else problem
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: this is not YAML: {reason}."
    lines = text.splitlines()
    shown = f"\n  {lines[mark.line].rstrip()}" if mark.line < len(lines) else ""
    place = f"line {mark.line + 1}, column {mark.column + 1}"
    return f"{path}, {place}: this is not YAML: {reason}.{shown}"
