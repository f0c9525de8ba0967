"""Which allocator works on which parameterization: a table made from what either says, and held against real runs by a test."""

from torch import nn

from adaptrank.allocation.allocator import ALLOCATORS
from adaptrank.parameterizations import PARAMETERIZATIONS, on_example


def rows() -> list[tuple[str, ...]]:
    """Every parameterization, and the hybrids: the oldest low-rank method on each that has no axis and wraps the same layers.

    A row is a nest of class names, innermost first.
    """
    linear = nn.Linear(48, 24)
    single = [
        name for name, cls in PARAMETERIZATIONS.items() if cls.__module__.startswith("adaptrank.")
    ]
    fixed = [name for name in single if not on_example(PARAMETERIZATIONS[name]).axes]
    ranked = [
        name for name in single if name not in fixed and PARAMETERIZATIONS[name].wraps(linear)
    ]
    oldest = min(ranked, key=lambda name: PARAMETERIZATIONS[name].source)
    hybrids = [(name, oldest) for name in fixed if PARAMETERIZATIONS[name].wraps(linear)]
    return [*((name,) for name in single), *hybrids]


def columns() -> list[str]:
    """The allocators of the library."""
    return [name for name, cls in ALLOCATORS.items() if cls.__module__.startswith("adaptrank.")]


def table() -> dict[str, dict[tuple[str, ...], str]]:
    """Allocator -> nest -> "works", the option it works without ("init=False"), or "" where it is refused."""
    return {name: {nest: ALLOCATORS[name].pair(*nest) for nest in rows()} for name in columns()}
