"""Which of a model's repeated blocks each rank axis lies in, told from the paths of the layers; and the sizes that fit them."""

import logging
from collections import Counter
from collections.abc import Mapping

from torch import nn

from adaptrank._errors import UserError
from adaptrank.axes import RankAxis
from adaptrank.parameterizations import wrapped_layers

log = logging.getLogger("adaptrank")


def find_blocks(model: nn.Module, axes: Mapping[str, RankAxis]) -> tuple[str, dict[str, list[int]]]:
    """The path of the list of blocks that holds most axes, and axis -> the numbers of its blocks.

    A block is a path up to a number: `model.layers.3` in `model.layers.3.mlp.up_proj`; of lists within lists the outermost counts. Layers
    that share a tensor lie in several blocks. An axis outside of the list has no number.

    Raises:
        ValueError: if no axis lies in a numbered list.
    """
    layers = {
        id(wrapper): path for path, layer in wrapped_layers(model).items() for wrapper in layer.nest
    }
    paths = {
        key: [layers[id(layer)].split(".") for layer, _ in axis.members]
        for key, axis in axes.items()
    }
    lists = Counter(
        place
        for key in paths
        for place in {
            ".".join(parts[:i])
            for parts in paths[key]
            for i, part in enumerate(parts)
            if part.isdigit()
        }
    )
    if not lists:
        raise UserError(
            f"The layers with an adapter lie in no numbered list of blocks, as {next(iter(axes))!r} does not; give `rank_pattern`."
        )
    best = min(lists, key=lambda place: (-lists[place], place.count("."), len(place), place))
    depth = len(best.split(".")) if best else 0
    numbers = {
        key: sorted({int(parts[depth]) for parts in found if _inside(parts, best, depth)})
        for key, found in paths.items()
    }
    return best, numbers


def _inside(parts: list[str], place: str, depth: int) -> bool:
    return ".".join(parts[:depth]) == place and len(parts) > depth and parts[depth].isdigit()


def cut(
    who: str, sizes: Mapping[str, int], caps: Mapping[str, int | None], steps: Mapping[str, int]
) -> dict[str, int]:
    """Sizes within the caps, in whole steps of units; one sentence says what was cut."""
    fits = {
        key: size if (cap := caps[key]) is None else min(size, cap) for key, size in sizes.items()
    }
    fits = {key: max(size - size % steps[key], 1) for key, size in fits.items()}
    over = [key for key in sizes if fits[key] < sizes[key]]
    if over:
        log.warning(
            "%s wants %d units for %s, which takes %d at most; %d such axes get fewer than they should.",
            who, sizes[over[0]], over[0], caps[over[0]], len(over),
        )  # fmt: skip
    return fits
