"""Sketches of the inputs of all layers of a model."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adaptrank._collectives import from_all
from adaptrank.allocation.initial.input_parts import read_columns
from adaptrank.allocation.initial.sketch import Sketch
from adaptrank.allocation.scores.importance import Axes, Scores
from adaptrank.axes import natural


class LayerRows(NamedTuple):
    """Rows that entered one layer in a forward pass.

    Args:
        tensor: identity of the tensor that they were cut from.
        rows: (tokens, n).
    """

    tensor: int
    rows: Tensor


class InputSketches:
    """Sketches of the inputs of every axis, one for each part of the input that its units read.

    Axes that read the same tensors, such as query, key and value, share their sketches.

    Args:
        axes: axes of the model.
        components: axis -> most components of a sketch.
        center: subtract the mean of the inputs.
    """

    def __init__(self, axes: Axes, components: Mapping[str, int], center: bool = True) -> None:
        self._components = components
        self._center = center
        self._columns = {key: read_columns(axis) for key, axis in axes.items()}
        self._owner: dict[str, str] = {}
        """Axis -> first axis that reads the same tensors."""
        self._sketches: dict[str, list[Sketch]] = {}
        """Owner -> sketch of each part."""

    def __contains__(self, key: str) -> bool:
        return key in self._owner

    def __getitem__(self, key: str) -> list[Sketch]:
        """Return the sketches of an axis, one for each part of its input."""
        return self._sketches[self._owner[key]]

    def add(self, inputs: Mapping[str, list[LayerRows]]) -> None:
        """Take in what entered the layers in one forward pass, axis -> rows of each layer.

        The first pass tells which axes share a sketch.
        """
        if not self._owner:
            self._find_owners(inputs)
        for key, sketches in self._sketches.items():
            if key not in inputs:
                continue
            rows = torch.cat([entry.rows for entry in inputs[key]])
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            parts = self._columns[key].to(rows.device)
            for sketch, part in zip(sketches, parts, strict=True):
                sketch.add(rows[:, part])

    def merge_processes(self) -> None:
        """Make each sketch one of the inputs of all processes."""
        for key in sorted(self._sketches, key=natural):
            for sketch in self._sketches[key]:
                moments = sketch.moments
                moments = moments._replace(SV=moments.SV.cpu(), mean=moments.mean.cpu())
                sketch.merge(from_all(moments))

    def shares(self) -> Scores:
        """Return the explained variance of the components of each axis that was seen.

        The first component of each part comes first, then the second: the order of the units.
        """
        shares = {}
        for key in self._owner:
            columns = [sketch.shares()[: self._components[key]] for sketch in self[key]]
            shares[key] = torch.stack(columns, 1).flatten()
        return shares

    def settled(self, sizes: Mapping[str, int], tau: float) -> bool:
        """Return whether no component of a unit turned further than tau in the last pass."""
        for key in self._owner:
            sketches = self[key]
            units_of_part = -(-sizes[key] // len(sketches))
            if not all(sketch.settled(units_of_part, tau) for sketch in sketches):
                return False
        return True

    def _find_owners(self, inputs: Mapping[str, list[LayerRows]]) -> None:
        first: dict[tuple[object, object], str] = {}
        for key in sorted(inputs, key=natural):
            tensors = tuple(entry.tensor for entry in inputs[key])
            parts = tuple(map(tuple, self._columns[key].tolist()))
            self._owner[key] = first.setdefault((tensors, parts), key)
        for owner in first.values():
            sharing = [key for key in self._owner if self._owner[key] == owner]
            components = max(self._components[key] for key in sharing)
            self._sketches[owner] = [Sketch(components, self._center) for _ in self._columns[owner]]
