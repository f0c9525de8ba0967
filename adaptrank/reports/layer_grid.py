"""Rank axes and layers as places in a grid: one row a layer, one column a kind of layer."""

from collections.abc import Sequence
from typing import NamedTuple


class LayerGrid(NamedTuple):
    """A grid of layers over kinds.

    Args:
        layers: numbers of the layers in rising order. "-" stands for axes outside of any layer.
        kinds: kinds of layers, such as "q_proj".
        places: axis -> (row, column).
    """

    layers: list[str]
    kinds: list[str]
    places: dict[str, tuple[int, int]]


def layer_grid(axes: Sequence[str]) -> LayerGrid:
    """Arrange axes in a grid.

    The layer of an axis is the last number in its path, and the kind is the last component. Where
    the axes have several names, the name of the axis is a part of the kind.

    Args:
        axes: keys of rank axes, `<path>:<name>`.
    """
    axis_names = {axis.rpartition(":")[2] for axis in axes}
    layer_of: dict[str, str] = {}
    kind_of: dict[str, str] = {}
    for axis in axes:
        path, _, name = axis.rpartition(":")
        components = path.split(".")
        numbers = [component for component in components if component.isdecimal()]
        kind = components[-1] or "layer"
        layer_of[axis] = numbers[-1] if numbers else "-"
        kind_of[axis] = f"{kind} {name}" if len(axis_names) > 1 else kind
    layers = sorted(set(layer_of.values()), key=_layer_order)
    kinds = list(dict.fromkeys(kind_of.values()))
    row_of = {layer: row for row, layer in enumerate(layers)}
    column_of = {kind: column for column, kind in enumerate(kinds)}
    places = {axis: (row_of[layer_of[axis]], column_of[kind_of[axis]]) for axis in layer_of}
    return LayerGrid(layers, kinds, places)


def _layer_order(layer: str) -> tuple[bool, int]:
    """Order layers by number, and those without a number last."""
    if layer.isdecimal():
        return False, int(layer)
    return True, 0
