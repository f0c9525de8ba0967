"""Maps of one number for each layer, and how composed adapters relate in each layer."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptrank.reports.figures.drawing import (
    LABELLED_ROWS,
    Cells,
    TextStyle,
    draw_heat_map,
    empty_cells,
    new_figure,
)
from adaptrank.reports.layer_grid import layer_grid

LayerMap = dict[str, float]
"""Path of a layer -> number."""


def heat_maps(
    maps: Mapping[str, Mapping[str, float]], file: Path, diverging: frozenset[str] = frozenset()
) -> None:
    """Draw one panel for each map, and write all of them as one PNG.

    Args:
        maps: title -> {path of a layer: number}. Layers without a number stay blank.
        file: file to write.
        diverging: titles of maps whose colors diverge from zero.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    paths = {path: None for values in maps.values() for path in values}
    grid = layer_grid([f"{path}:" for path in paths])
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    width = max(3.2, 0.55 * len(grid.kinds) + 1.8)
    height = max(2.4, 0.17 * len(grid.layers) + 1.6)
    figure = new_figure(width * columns, height * rows, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (title, values) in zip(panels, maps.items(), strict=False):
        cells = empty_cells(grid)
        for path, value in values.items():
            cells[grid.places[f"{path}:"]] = value
        image = draw_heat_map(
            panel,
            cells,
            grid,
            title,
            TextStyle(title=9, labels=7, angle=60),
            row_step=-(-len(grid.layers) // LABELLED_ROWS),
            **_colors(cells, title in diverging),
        )
        figure.colorbar(image, ax=panel, shrink=0.8)
        panel.set_ylabel("layer", fontsize=8)
    for panel in panels[len(maps) :]:
        panel.set_axis_off()
    figure.savefig(file, dpi=120)


def draw_composition(report: Mapping[str, Any], file: Path) -> None:
    """Draw how composed adapters relate in each layer, as one PNG.

    There are panels for the cosine of each pair of adapters, the relative size of each adapter and
    the interference. Panels for the ranks and the errors of a compression follow, if there was one.

    Args:
        report: report of `adaptrank.composition.compose`.
        file: file to write.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    layers = report["layers"]
    cosines = _cosine_maps(report["pairs"], layers)
    maps = {
        **cosines,
        **_size_maps(report["adapters"], layers),
        "interference": {path: facts["interference"] for path, facts in layers.items()},
    }
    for name in ("rank", "error"):
        if any(name in facts for facts in layers.values()):
            maps[name] = {path: facts.get(name, math.nan) for path, facts in layers.items()}
    diverging = frozenset([*cosines, "interference"])
    heat_maps({title: values for title, values in maps.items() if values}, file, diverging)


def _cosine_maps(
    pairs: Iterable[Mapping[str, Any]], layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, LayerMap]:
    """Return the cosine of each pair of adapters in the layers that both change."""
    maps: dict[str, LayerMap] = {}
    for pair in pairs:
        name = " + ".join(pair["adapters"])
        maps[f"cosine, {name}"] = {
            path: facts["cos"][name] for path, facts in layers.items() if name in facts["cos"]
        }
    return maps


def _size_maps(
    adapters: Iterable[str], layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, LayerMap]:
    """Return the size of each adapter's change, relative to the weight."""
    maps: dict[str, LayerMap] = {}
    for position, adapter in enumerate(adapters):
        sizes = {path: facts["relative"][position] for path, facts in layers.items()}
        maps[f"|D| / |W|, {adapter}"] = {
            path: size for path, size in sizes.items() if size is not None
        }
    return maps


def _colors(cells: Cells, diverging: bool) -> dict[str, Any]:
    """Return the color map of a panel. A diverging one has its middle at zero."""
    if not diverging:
        return {"cmap": "viridis"}
    largest = float(np.nanmax(np.abs(cells))) if np.isfinite(cells).any() else 1.0
    return {"cmap": "RdBu_r", "vmin": -largest or -1, "vmax": largest or 1}
