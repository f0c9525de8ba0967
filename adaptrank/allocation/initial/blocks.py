"""Repeated blocks of a model: in which of them a rank axis lies, and the sizes that fit.

Blocks are recognized by the paths of the layers.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from adaptrank._errors import UserError
from adaptrank.axes import RankAxis
from adaptrank.parameterizations import wrapped_layers

log = logging.getLogger("adaptrank")


def find_blocks(model: nn.Module, axes: Mapping[str, RankAxis]) -> tuple[str, dict[str, list[int]]]:
    """Return the path of the list of blocks that holds most axes, and axis -> its block numbers.

    A block is a path up to a number: `model.layers.3` in `model.layers.3.mlp.up_proj`. Of nested
    lists the outermost counts. Layers that share a tensor lie in several blocks. An axis outside
    of the list has no number.

    Raises:
        UserError: if no axis lies in a numbered list.
    """
    paths = _paths_of(model, axes)
    axes_in: Counter[str] = Counter()
    for paths_of_axis in paths.values():
        axes_in.update(_numbered_lists(paths_of_axis))
    if not axes_in:
        raise UserError(
            f"The layers with an adapter lie in no numbered list of blocks, as "
            f"{next(iter(axes))!r} does not. Give `rank_pattern`."
        )
    place = min(axes_in, key=lambda path: (-axes_in[path], path.count("."), len(path), path))
    return place, {key: _numbers_in(place, paths[key]) for key in paths}


def _paths_of(model: nn.Module, axes: Mapping[str, RankAxis]) -> dict[str, list[list[str]]]:
    """Return axis -> paths of its layers, each split at its dots."""
    path_of: dict[int, str] = {}
    for path, layer in wrapped_layers(model).items():
        for wrapper in layer.nest:
            path_of[id(wrapper)] = path
    paths = {}
    for key, axis in axes.items():
        paths[key] = [path_of[id(layer)].split(".") for layer, _ in axis.members]
    return paths


def _numbered_lists(paths: Sequence[Sequence[str]]) -> set[str]:
    """Return the path before each number in these paths."""
    lists = set()
    for parts in paths:
        for depth, part in enumerate(parts):
            if part.isdigit():
                lists.add(".".join(parts[:depth]))
    return lists


def _numbers_in(place: str, paths: Sequence[Sequence[str]]) -> list[int]:
    """Return the block numbers of these paths in the list at `place`, without repetition."""
    depth = len(place.split(".")) if place else 0
    numbers = set()
    for parts in paths:
        inside = ".".join(parts[:depth]) == place and len(parts) > depth
        if inside and parts[depth].isdigit():
            numbers.add(int(parts[depth]))
    return sorted(numbers)


def warn_outside(who: str, place: str, outside: Sequence[str]) -> None:
    """Say which axes lie in no block and keep their rank."""
    if outside:
        rest = ", ..." if len(outside) > 3 else ""
        log.warning(
            "%s: %d axes lie outside of the blocks in %r and keep their rank: %s%s.",
            who,
            len(outside),
            place,
            ", ".join(outside[:3]),
            rest,
        )


def cut(
    who: str, sizes: Mapping[str, int], caps: Mapping[str, int | None], steps: Mapping[str, int]
) -> dict[str, int]:
    """Return sizes within the caps, in whole steps of units. A warning says what was cut.

    Args:
        who: name for the warning.
        sizes: axis -> wanted units.
        caps: axis -> largest number of units, None for no cap.
        steps: axis -> units in one step.
    """
    fitting = {}
    for key, size in sizes.items():
        cap = caps[key]
        within = size if cap is None else min(size, cap)
        fitting[key] = max(within - within % steps[key], 1)
    too_large = [key for key in sizes if fitting[key] < sizes[key]]
    if too_large:
        key = too_large[0]
        log.warning(
            "%s wants %d units for %s, which takes %d at most. %d such axes get fewer than they "
            "should.",
            who,
            sizes[key],
            key,
            caps[key],
            len(too_large),
        )
    return fitting
