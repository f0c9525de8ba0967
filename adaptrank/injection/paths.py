"""Dotted paths of modules, and the names that mean them."""

from collections.abc import Iterable


def last_name(path: str) -> str:
    """Return the last component of a path: "q_proj" of "layers.0.q_proj"."""
    return path.rsplit(".", 1)[-1]


def ends_in(path: str, name: str) -> bool:
    """Return whether a path is this name, or ends in it as whole components."""
    return path == name or path.endswith(f".{name}")


def lies_in(path: str, parents: Iterable[str]) -> bool:
    """Return whether a path is one of these paths, or of a module inside one of them."""
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)
