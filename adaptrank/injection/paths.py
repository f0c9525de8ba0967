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


def block_of(path: str) -> str:
    """Return a path up to the last number before its name: "layers.0" of "layers.0.mlp.up_proj".

    A path without such a number is that of a layer outside of all blocks, and stays as it is.
    """
    components = path.split(".")
    numbers = [place for place, component in enumerate(components[:-1]) if component.isdigit()]
    return ".".join(components[: numbers[-1] + 1]) if numbers else path
