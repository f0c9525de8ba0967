"""Table of the allocators that work on each parameterization.

An allocator requires capabilities, and an axis has them. The table of pairs is made from these
words, and a test holds every cell against a real run.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptrank.axes import RankAxis, rank_axes
from adaptrank.parameterizations import PARAMETERIZATIONS, Parameterization, on_example

if TYPE_CHECKING:
    from adaptrank.allocation.participant import Participant


def misfit(participant: "Participant", axis: RankAxis) -> str:
    """Return why an allocator cannot work on an axis, as the middle of a sentence; "" if it can."""
    missing = participant.requires - axis.capabilities
    if missing:
        return f"needs axes that can {_words(missing)}"
    for name, needs in participant.options.items():
        value = getattr(participant, name)
        missing = needs - axis.capabilities
        if value and missing:
            return (
                f"with {name}={value!r} needs axes that can {_words(missing)} "
                f"(with {name}={_off(value)!r} it does not)"
            )
    return ""


def fitting_methods(participant: "Participant") -> list[str]:
    """Return the names of the parameterizations that an allocator works with."""
    names = []
    for name in PARAMETERIZATIONS:
        try:
            axes = example_axes(name)
            if axes and not any(misfit(participant, axis) for axis in axes.values()):
                names.append(name)
        except Exception:  # a user's unfinished class must not hide the sentence to be said
            continue
    return names


def suggestion(participant: "Participant") -> str:
    """Return which parameterizations to use, as the end of a sentence."""
    names = fitting_methods(participant)
    return f"use one of {', '.join(names)}" if names else "no parameterization here can"


def nesting_hint(participant: "Participant", layer: Parameterization) -> str:
    """Return how to nest a fitting method on a wrapped layer; "" if none can wrap it."""
    merges = all(wrapper.mergeable for wrapper in layer.nest)
    candidates = []
    for name in fitting_methods(participant):
        method = PARAMETERIZATIONS[name]
        if method.wraps(layer.innermost) and (merges or not method.reads_weight):
            candidates.append(name)
    if not candidates:
        return ""
    # The oldest method is the best known.
    oldest = min(candidates, key=lambda name: PARAMETERIZATIONS[name].source)
    nest = [type(wrapper).__name__ for wrapper in layer.nest]
    return f", or nest one: [{', '.join([*nest, oldest])}]"


def pair(allocator: type["Participant"], *methods: str) -> str:
    """Return what becomes of an allocator on a parameterization or a nest, all at its defaults.

    Args:
        allocator: class of the allocator.
        methods: class names of a nest, innermost first.
    Returns:
        "works"; "init=False" and the like if it works with that option off; "" if it is refused.
    """
    axes = example_axes(*methods)
    if not axes or inspect.isabstract(allocator):
        return ""
    try:
        participant = allocator()  # type: ignore[call-arg]  # a concrete class has defaults
    except TypeError:  # a user's class whose arguments have no defaults
        fits = all(allocator.requires <= axis.capabilities for axis in axes.values())
        return "works" if fits else ""
    if _fits(participant, axes):
        return "works"
    off = {
        name: _off(getattr(participant, name))
        for name in participant.options
        if getattr(participant, name)
    }
    for name, value in off.items():
        setattr(participant, name, value)
    if off and _fits(participant, axes):
        return ", ".join(f"{name}={value!r}" for name, value in off.items())
    return ""


def nests() -> list[tuple[str, ...]]:
    """Return the rows of the table of pairs: every parameterization, and the hybrids.

    A hybrid puts the oldest low-rank method on each method that has no axis and wraps the same
    layers. A row is a nest of class names, innermost first.
    """
    linear = nn.Linear(48, 24)
    shipped = [name for name, cls in PARAMETERIZATIONS.items() if _is_shipped(cls)]
    without_axis = [name for name in shipped if not on_example(PARAMETERIZATIONS[name]).axes]
    with_axis = [
        name
        for name in shipped
        if name not in without_axis and PARAMETERIZATIONS[name].wraps(linear)
    ]
    oldest = min(with_axis, key=lambda name: PARAMETERIZATIONS[name].source)
    hybrids = [(name, oldest) for name in without_axis if PARAMETERIZATIONS[name].wraps(linear)]
    return [*((name,) for name in shipped), *hybrids]


def table(allocators: Mapping[str, type["Participant"]]) -> dict[str, dict[tuple[str, ...], str]]:
    """Return allocator -> nest -> cell of `pair`, for the allocators of the library."""
    rows = nests()
    cells: dict[str, dict[tuple[str, ...], str]] = {}
    for name, allocator in allocators.items():
        if _is_shipped(allocator):
            cells[name] = {nest: pair(allocator, *nest) for nest in rows}
    return cells


def example_axes(*methods: str) -> dict[str, RankAxis]:
    """Return the axes of a nest with default arguments, on the example of the innermost method."""
    holder = nn.Module()
    if len(methods) == 1:
        holder.layer = on_example(PARAMETERIZATIONS[methods[0]])
        return rank_axes(holder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = PARAMETERIZATIONS[methods[0]].example()
        for method in methods:
            layer = PARAMETERIZATIONS[method](layer)
    holder.layer = layer
    return rank_axes(holder)


def _fits(participant: "Participant", axes: Mapping[str, RankAxis]) -> bool:
    return not any(misfit(participant, axis) for axis in axes.values())


def _is_shipped(cls: type) -> bool:
    return cls.__module__.startswith("adaptrank.")


def _words(capabilities: Iterable[str]) -> str:
    return ", ".join(sorted(capabilities))


def _off(value: Any) -> Any:
    """Return the value that switches an option off."""
    return None if value is None or isinstance(value, str) else type(value)()
