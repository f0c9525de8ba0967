"""Rank axes and layers as places in a grid: one row a layer, one column a kind of layer."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

KIND_ORDER = (
    ("qkv", "query_key_value", "c_attn", "wqkv"),
    ("q", "query", "to_q", "wq"),
    ("k", "key", "to_k", "wk"),
    ("v", "value", "to_v", "wv"),
    ("o", "out", "to_out", "attn.c_proj", "attention.output.dense"),
    ("gate", "w1"),
    ("gate_up",),
    ("up", "w3", "wi", "wi_0", "wi_1", "fc1", "lin1", "c_fc", "intermediate.dense"),
    ("down", "w2", "wo", "fc2", "lin2", "mlp.c_proj", "output.dense"),
)
"""Names of the layers of a transformer block without endings, in the order of the columns."""

ENDINGS = ("_proj", "_lin")


class LayerGrid(NamedTuple):
    """A grid of layers over kinds.

    Args:
        layers: numbers of the layers in rising order. "-" stands for axes outside of any layer.
        kinds: kinds of layers, such as "q_proj", in one order for all reports: query, key, value,
            output, gate, up, down, and then the others as they come.
        places: axis -> (row, column).
    """

    layers: list[str]
    kinds: list[str]
    places: dict[str, tuple[int, int]]


class _Place(NamedTuple):
    """The path of a layer, split at its number."""

    before: tuple[str, ...]
    layer: str
    after: tuple[str, ...]


def layer_grid(axes: Sequence[str]) -> LayerGrid:
    """Arrange axes in a grid.

    The layer of an axis is the first number in its path. The kind is the last component, or as much
    of the path as tells the layers of one row apart, such as "attention.output.dense". Where the
    axes have several names, the name of the axis is a part of the kind.

    Args:
        axes: keys of rank axes, `<path>:<name>`.
    """
    axis_names = {axis.rpartition(":")[2] for axis in axes}
    path_of = {axis: axis.rpartition(":")[0] for axis in axes}
    place_of = {path: _split(path) for path in path_of.values()}
    kind_of_path = _kinds(place_of)
    kind_of: dict[str, str] = {}
    for axis, path in path_of.items():
        name = axis.rpartition(":")[2]
        kind = kind_of_path[path]
        kind_of[axis] = f"{kind} {name}" if len(axis_names) > 1 else kind
    layers = sorted({place.layer for place in place_of.values()}, key=_layer_order)
    kinds = _in_order(dict.fromkeys(kind_of.values()))
    row_of = {layer: row for row, layer in enumerate(layers)}
    column_of = {kind: column for column, kind in enumerate(kinds)}
    places = {
        axis: (row_of[place_of[path].layer], column_of[kind_of[axis]])
        for axis, path in path_of.items()
    }
    return LayerGrid(layers, kinds, places)


def in_grid_order(paths: Iterable[str]) -> list[str]:
    """Sort paths of layers by layer, and then by kind in the order of the columns."""
    places = layer_grid([f"{path}:" for path in paths]).places
    return [axis.removesuffix(":") for axis in sorted(places, key=places.__getitem__)]


def _split(path: str) -> _Place:
    """Split a path at its first number."""
    components = path.split(".")
    for index, component in enumerate(components):
        if component.isdecimal():
            after = tuple(components[index + 1 :])
            return _Place(tuple(components[:index]), component, after)
    return _Place((), "-", tuple(components))


def _kinds(place_of: dict[str, _Place]) -> dict[str, str]:
    """Return the kind of each path: the shortest of three names that differ within every layer."""
    by_name: dict[str, list[str]] = {}
    for path, place in place_of.items():
        by_name.setdefault(_last_name(place), []).append(path)
    kinds: dict[str, str] = {}
    for name, paths in by_name.items():
        names = [
            dict.fromkeys(paths, name),
            {path: ".".join(place_of[path].after) for path in paths},
            {path: ".".join(place_of[path].before + place_of[path].after) for path in paths},
        ]
        distinct = [each for each in names if _are_distinct(each, place_of)]
        kinds |= next(iter(distinct), names[-1])
    return kinds


def _last_name(place: _Place) -> str:
    """Return the last component of a path that is no number."""
    words = [word for word in place.before + place.after if word and not word.isdecimal()]
    return words[-1] if words else "layer"


def _are_distinct(kinds: dict[str, str], place_of: dict[str, _Place]) -> bool:
    """Tell whether no two paths of one layer have the same kind."""
    cells = {(place_of[path].layer, kind) for path, kind in kinds.items()}
    return all(kinds.values()) and len(cells) == len(kinds)


def _in_order(kinds: Iterable[str]) -> list[str]:
    """Sort kinds by `KIND_ORDER`. Other kinds follow as they come."""
    position_of = {name: position for position, names in enumerate(KIND_ORDER) for name in names}

    def position(kind: str) -> int:
        components = kind.partition(" ")[0].lower().split(".")
        names = [".".join(components[start:]) for start in range(len(components))]
        names += [names[-1].removesuffix(ending) for ending in ENDINGS]
        found = [position_of[name] for name in names if name in position_of]
        return next(iter(found), len(KIND_ORDER))

    return sorted(kinds, key=position)


def _layer_order(layer: str) -> tuple[bool, int]:
    """Order layers by number, and those without a number last."""
    if layer.isdecimal():
        return False, int(layer)
    return True, 0
