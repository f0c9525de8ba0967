"""Effective rank and size of the changes of each kind of layer, for each row of a study."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptrank.reports.comparison import setting_label
from adaptrank.reports.layer_grid import layer_grid

Layers = list[Mapping[str, Any]]
"""Measures of some layers."""


@dataclass(frozen=True)
class KindTable:
    """Table of the changes by kind of layer.

    Args:
        kinds: kinds of layers, such as "query", in the order of all reports.
        cells: label of a setting -> for each kind the effective rank of the change D, and
            |D| / |W| in brackets. It is "-" for a kind without a change.
    """

    kinds: list[str]
    cells: dict[str, list[str]]


def kind_table(record: Mapping[str, Any]) -> KindTable | None:
    """Return the means over layers and seeds, or None if the study measured no change.

    Args:
        record: results of a study, see `run_study`.
    """
    results = [result for result in record["results"] if result.get("spectra")]
    paths: dict[str, None] = {}
    for result in results:
        paths.update(dict.fromkeys(result["spectra"]))
    if not paths:
        return None
    grid = layer_grid([f"{path}:" for path in paths])
    layers_of: dict[str, list[Layers]] = {}
    for result in results:
        by_kind = layers_of.setdefault(setting_label(result), [[] for _ in grid.kinds])
        for path, measures in result["spectra"].items():
            by_kind[grid.places[f"{path}:"][1]].append(measures)
    cells = {label: [_cell(layers) for layers in by_kind] for label, by_kind in layers_of.items()}
    return KindTable(grid.kinds, cells)


def _cell(layers: Layers) -> str:
    """Return effective rank and relative size of some layers' changes, as means."""
    rank = _mean(layer.get("effective_rank") for layer in layers)
    size = _mean(layer.get("relative") for layer in layers)
    if rank is None:
        return "-"
    return f"{rank:.3g}" if size is None else f"{rank:.3g} ({size:.2g})"


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known, or None."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
