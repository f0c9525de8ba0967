"""How many units each layer keeps, and when that changes: allocators and rank initializers."""

from adaptrank.allocation import initial, methods
from adaptrank.allocation.allocator import ALLOCATORS, Allocator

ALLOCATORS.import_folder(methods.__name__, methods.__path__)
ALLOCATORS.import_folder(initial.__name__, initial.__path__)


def __getattr__(name: str) -> type[Allocator]:
    """`from adaptrank.allocation import ElaLoRA`, with no second list to keep."""
    if name in ALLOCATORS:
        return ALLOCATORS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["ALLOCATORS", "Allocator"]
