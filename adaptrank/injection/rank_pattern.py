"""Rank patterns: sizes of axes by key, path, last component or regular expression."""

import re
from collections.abc import Mapping

from torch import nn

from adaptrank._errors import UserError, did_you_mean, some
from adaptrank.axes import RankAxis, generator, rank_axes
from adaptrank.injection.paths import last_name
from adaptrank.parameterizations import wrapped_layers

RankPattern = Mapping[str, int | Mapping[str, int]]
"""Axis key, path, last component or regular expression -> number of units, or {axis: units}."""


def apply_rank_pattern(model: nn.Module, pattern: RankPattern, seed: int = 0) -> None:
    """Give the axes of a model the sizes of a pattern.

    Of several entries the most specific one decides: axis key, path, last component, expression.

    Args:
        model: adapted.
        pattern: sizes.
        seed: seed of the generator that initializes new units.
    Raises:
        ValueError: for a key that names no axis, or a size outside an axis' limits.
    """
    resize_by_pattern(model, rank_axes(model), pattern, seed)


def resize_by_pattern(
    model: nn.Module, axes: Mapping[str, RankAxis], pattern: RankPattern, seed: int
) -> None:
    """Give some axes of a model the sizes of a pattern; see `apply_rank_pattern`."""
    path_of_wrapper = {
        id(wrapper): path for path, layer in wrapped_layers(model).items() for wrapper in layer.nest
    }
    paths = {key: path_of_wrapper[id(axis.members[0][0])] for key, axis in axes.items()}
    used: set[str] = set()
    for key, axis in axes.items():
        entries = _matching_entries(key, paths[key], pattern)
        used.update(entries)
        size = _size(key, entries[0], pattern) if entries else len(axis)
        if size != len(axis):
            _resize(key, axis, size, seed)
    for entry in pattern:
        if entry not in used:
            known = {*axes, *paths.values(), *map(last_name, paths.values())}
            raise UserError(
                f"rank_pattern names {entry!r}, which is no axis of this model; "
                f"axes here: {some(axes)}.{did_you_mean(entry, known)}"
            )


def _matching_entries(key: str, path: str, pattern: RankPattern) -> list[str]:
    """Return the entries of a pattern that mean an axis, the most specific one first."""
    # Where two adapters of a nest have an axis of one name, this path has the position in the nest.
    path_in_key, _, _ = key.rpartition(":")
    names = dict.fromkeys((key, path_in_key, path, last_name(path)))
    entries = [name for name in names if name in pattern]
    return entries + [
        entry for entry in pattern if entry not in entries and _matches_expression(entry, path)
    ]


def _size(key: str, entry: str, pattern: RankPattern) -> int:
    """Return the size that an entry of a pattern gives to an axis."""
    _, _, axis_name = key.rpartition(":")
    value = pattern[entry]
    sizes = value if isinstance(value, Mapping) else {axis_name: value}
    if axis_name not in sizes:
        raise UserError(
            f"rank_pattern gives {entry!r} sizes of {some(sizes)}, "
            f"and {key} is the axis there: {axis_name!r}."
        )
    size = sizes[axis_name]
    if not isinstance(size, int) or isinstance(size, bool):
        raise UserError(
            f"rank_pattern gives {entry!r} the size {size!r}; a size is a whole number of units."
        )
    return size


def _resize(key: str, axis: RankAxis, size: int, seed: int) -> None:
    if not axis.allows(size):
        least, largest = axis.limits()
        raise UserError(
            f"rank_pattern asks {key} for {size} units; "
            f"it holds {least} to {largest or 'any number'}."
        )
    kept = min(size, len(axis))
    axis.resize(range(kept), size - kept, generator(seed, key, 0))


def _matches_expression(expression: str, path: str) -> bool:
    try:
        return re.fullmatch(expression, path) is not None
    except re.error:
        # An axis key or a path need not be a regular expression.
        return False
