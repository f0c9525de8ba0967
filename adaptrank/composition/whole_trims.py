"""Trim over whole task vectors: the passes over all layers, before one of them is combined."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from adaptrank.composition.changes import Change
from adaptrank.composition.election import balance, elected_signs
from adaptrank.composition.operators import task_matrices
from adaptrank.composition.trimming import (
    LayerTrim,
    TaskMatrices,
    kept_in_layers,
    largest,
)

LayerChanges = Callable[[], Iterable[tuple[str, Sequence[Change | None]]]]
"""A pass over all layers: yields (path, change of each adapter), in the same order at each call."""


def whole_trims(
    operator: str,
    options: Mapping[str, Any],
    weights: Sequence[float],
    layers: LayerChanges,
) -> dict[str, LayerTrim]:
    """Return each layer's part of a trim over all layers, for the `whole` of an operator.

    The whole task vector of an adapter has the entries of the layers that it changes. Entries that
    are equal stay in the order of the layers, then of their indices.

    Args:
        operator: name of the operator.
        options: all its options, see `options_of`.
        weights: one for each adapter.
        layers: a pass over all layers, see `kept_in_layers`. There is one more to elect signs.
    Returns:
        {path: part of the layer}. It is empty for an operator that does not trim, or trims layer by
        layer.
    """
    if options.get("trim") != "whole":
        return {}

    def matrices() -> Iterator[tuple[str, TaskMatrices]]:
        for path, layer_changes in layers():
            yield path, _of_tasks(operator, layer_changes, path, options)

    kept = kept_in_layers(matrices, len(weights), options["density"])
    difference = 0
    if options.get("elect") == "total":
        difference = _difference(matrices(), kept, weights)
    return {path: LayerTrim(counts, difference) for path, counts in kept.items()}


def _of_tasks(
    operator: str, changes: Sequence[Change | None], path: str, options: Mapping[str, Any]
) -> TaskMatrices:
    """Return the matrices that an operator trims in a layer, None for a task without a change."""
    present = [change for change in changes if change is not None]
    if not present:
        return [None] * len(changes)
    matrices = iter(task_matrices(operator, present, path, options))
    return [None if change is None else next(matrices) for change in changes]


def _difference(
    layers: Iterable[tuple[str, TaskMatrices]],
    kept: Mapping[str, Sequence[int]],
    weights: Sequence[float],
) -> int:
    """Return how many more entries of the whole elected vector are positive than negative."""
    difference = 0
    for path, matrices in layers:
        pairs = zip(weights, matrices, strict=True)
        voting = [(weight, D) for weight, D in pairs if D is not None]
        if not voting:
            continue
        trimmed = [largest(D, count) for (_, D), count in zip(voting, kept[path], strict=True)]
        difference += balance(elected_signs(trimmed, [weight for weight, _ in voting], "total"))
    return difference
