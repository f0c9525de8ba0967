"""How many units each layer keeps, and when that changes. One paper, one file; the registry is what the folder defines and what users subclass."""

from adaptrank.allocators.base import ALLOCATORS, Allocator

ALLOCATORS.import_folder(__name__, __path__)


def __getattr__(name: str) -> type[Allocator]:
    """`from adaptrank.allocators import ElaLoRA`, with no second list to keep."""
    if name in ALLOCATORS:
        return ALLOCATORS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["ALLOCATORS", "Allocator"]
