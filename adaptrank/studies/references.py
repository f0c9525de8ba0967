"""References of one row of a study to another, whose run it starts from.

A text `$ranks:METHOD` or `$ranks:METHOD:ALLOCATOR` in a configuration stands for the file of the
final ranks of that run, with the same seed and budget. `$run:METHOD` stands for the folder of the
run.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from adaptrank._errors import did_you_mean
from adaptrank.studies.overlays import Config, merge

REFERENCE = re.compile(r"\$(?P<what>ranks|run):(?P<method>[^:]+)(:(?P<allocator>.+))?")


def replay_references(value: Any) -> list[str]:
    """Return the texts of plain data that refer to another point."""
    if isinstance(value, str):
        return [value] if REFERENCE.fullmatch(value) else []
    entries: list[Any] = []
    if isinstance(value, Mapping):
        entries = list(value.values())
    elif isinstance(value, list):
        entries = value
    references: list[str] = []
    for entry in entries:
        references += replay_references(entry)
    return references


def without_replays(value: Any) -> Any:
    """Return a configuration without the keys whose values are references."""
    if isinstance(value, dict):
        return {
            key: without_replays(entry)
            for key, entry in value.items()
            if not (isinstance(entry, str) and REFERENCE.fullmatch(entry))
        }
    if isinstance(value, list):
        return [without_replays(entry) for entry in value]
    return value


def check_replays(
    config: Config,
    methods: Mapping[str, Config],
    allocators: Mapping[str, Config],
    require: Callable[[bool, str], None],
) -> None:
    """Refuse references to rows that a study does not have, or that refer to others themselves.

    Args:
        config: configuration that all rows start from.
        methods: name -> overlay.
        allocators: name -> overlay.
        require: (condition, mistake), refuses the study unless the condition holds.
    """
    references = {}
    for row in itertools.product(methods, allocators):
        method, allocator = row
        merged = merge(merge(config, methods[method]), allocators[allocator])
        references[row] = replay_references(merged)
    for (method, _), texts in references.items():
        for text in texts:
            reference = REFERENCE.fullmatch(text)
            assert reference is not None
            name, allocator = reference["method"], reference["allocator"] or "none"
            require(
                name in methods,
                f"{method} refers to {text}, and {name!r} is none of the methods."
                f"{did_you_mean(name, methods)} There are {', '.join(methods)}",
            )
            require(
                allocator in allocators,
                f"{method} refers to {text}, and {allocator!r} is none of the allocators. Write "
                f"${reference['what']}:{name}:NAME with one of {', '.join(allocators)}",
            )
            require(
                not references[name, allocator],
                f"{method} refers to {text}, which refers to another row itself. Refer to that one",
            )
