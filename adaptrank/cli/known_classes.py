"""Names of the classes that fit a key of the configuration, for what a mistake says."""

import inspect
from typing import Any, get_args

from adaptrank._errors import some

HIDDEN = ("lightning.pytorch.demos", "lightning.pytorch.cli", "adaptrank.cli", "unittest")
"""Modules whose classes nobody would name in a configuration."""


def class_of(kind: Any) -> type | None:
    """Return the class whose subclasses fit a type. For `list[Callable[[A], B]] | None` it is B."""
    if isinstance(kind, type) and not get_args(kind):
        return None if kind.__module__ == "builtins" else kind
    classes = (class_of(part) for part in get_args(kind))
    return next((cls for cls in classes if cls is not None), None)


def subclasses(base: type | None) -> list[type]:
    """Return the public, concrete classes under a base that are known by now, and the base."""
    if base is None:
        return []
    found = [base]
    for cls in found:
        children: list[type] = type.__subclasses__(cls)
        found += [child for child in children if child not in found]
    return [cls for cls in found if _is_public(cls)]


def _is_public(cls: type) -> bool:
    private = cls.__name__.startswith("_") or "<locals>" in cls.__qualname__
    return not (private or inspect.isabstract(cls) or cls.__module__.startswith(HIDDEN))


def known_classes(base: type | None) -> list[str]:
    """Return the names of the classes under a base."""
    return [cls.__name__ for cls in subclasses(base) if cls is not base]


def one_of(base: type | None, words: str = "one of ") -> str:
    """Return "one of A, B, C": the classes under a base that no other class derives from.

    Those of this library come first, also where a user's class derives from one.
    """
    classes = [cls for cls in subclasses(base) if cls is not base]
    own = {cls.__name__ for cls in classes if _is_ours(cls) and not any(map(_is_ours, _under(cls)))}
    others = {cls.__name__ for cls in classes if not _is_ours(cls) and not _under(cls)}
    return words + some([*sorted(own), *sorted(others - own)], 12)


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("adaptrank.")


def _under(cls: type) -> list[type]:
    children: list[type] = type.__subclasses__(cls)
    return children
