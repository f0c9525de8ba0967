"""Maps of one number for each layer, and how composed adapters relate in each layer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptrank.reports.figures.drawing import (
    NORMAL,
    SMALL,
    Cells,
    draw_heat_map,
    empty_cells,
    largest,
    map_size,
    new_figure,
    save,
)
from adaptrank.reports.layer_grid import LayerGrid, layer_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.image import AxesImage

MOST_COLUMNS = 3
"""Largest number of maps beside each other."""


@dataclass(frozen=True)
class Scale:
    """Color scale of some maps. Maps of one scale can be compared by color.

    Args:
        meaning: text beside the color bar.
        diverging: whether the colors diverge from zero. Otherwise they start at zero.
        highest: value of the last color. None takes the largest value of the maps.
    """

    meaning: str
    diverging: bool = False
    highest: float | None = None


@dataclass(frozen=True)
class LayerMap:
    """One number for each layer.

    Args:
        title: title of the map.
        scale: what its colors mean.
        values: path of a layer -> number. Layers without a number stay blank.
    """

    title: str
    scale: Scale
    values: dict[str, float] = field(default_factory=dict)


def heat_maps(maps: Sequence[LayerMap], file: Path) -> None:
    """Draw one panel for each map, and write all of them as one PNG.

    Maps of one scale stand together, with one color bar.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    paths = {path: None for each in maps for path in each.values}
    grid = layer_grid([f"{path}:" for path in paths])
    lines = _lines(maps)
    columns = max(map(len, lines), default=1)
    width, height = map_size(grid, 0.3, 0.2 if len(grid.layers) <= 8 else 0.13)
    figure = new_figure(columns * width + 0.3, max(len(lines), 1) * (height + 0.5))
    parts = figure.subfigures(max(len(lines), 1), 1, squeeze=False).flatten()
    for part, line in zip(parts, lines, strict=False):
        _draw_line(part, line, grid, columns, maps)
    save(figure, file)


def _lines(maps: Iterable[LayerMap]) -> list[list[LayerMap]]:
    """Return the maps line by line. Maps of one scale stand beside each other."""
    by_scale: dict[Scale, list[LayerMap]] = {}
    for each in maps:
        by_scale.setdefault(each.scale, []).append(each)
    lines: list[list[LayerMap]] = [[]]
    for group in by_scale.values():
        if len(lines[-1]) + len(group) > MOST_COLUMNS:
            lines.append([])
        starts = range(0, len(group), MOST_COLUMNS)
        pieces = [group[start : start + MOST_COLUMNS] for start in starts]
        lines[-1] += pieces[0]
        lines += pieces[1:]
    return [line for line in lines if line]


def _range(maps: Iterable[LayerMap], scale: Scale) -> tuple[float, float]:
    """Return the values of the first and the last color of a scale."""
    cells = [value for each in maps if each.scale == scale for value in each.values.values()]
    known: Cells = np.array([value for value in cells if math.isfinite(value)] or [math.nan])
    high = scale.highest or largest(abs(known)) or 1.0
    return (-high, high) if scale.diverging else (0.0, high)


def _draw_line(
    part: "SubFigure",
    line: Sequence[LayerMap],
    grid: LayerGrid,
    columns: int,
    maps: Sequence[LayerMap],
) -> None:
    """Draw maps beside each other, and a color bar below those of one scale."""
    panels = part.subplots(1, columns, squeeze=False)[0]
    images: dict[Scale, AxesImage] = {}
    panels_of: dict[Scale, list[Axes]] = {}
    for panel, each in zip(panels, line, strict=False):
        cells = empty_cells(grid)
        for path, value in each.values.items():
            cells[grid.places[f"{path}:"]] = value
        colors = "RdBu_r" if each.scale.diverging else "YlGnBu"
        low, high = _range(maps, each.scale)
        images[each.scale] = draw_heat_map(panel, cells, grid, each.title, colors, low, high)
        panels_of.setdefault(each.scale, []).append(panel)
    panels[0].set_ylabel("layer", fontsize=NORMAL)
    for panel in panels[len(line) :]:
        panel.set_axis_off()
    for scale, image in images.items():
        own = panels_of[scale]
        bar = part.colorbar(image, ax=own, location="bottom", aspect=20 * len(own), pad=0.02)
        bar.set_label(scale.meaning, fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)


COSINE = Scale("cosine (red: alike, blue: opposite)", diverging=True)
SIZE = Scale("size beside the weight, |D| / |W|")
INTERFERENCE = Scale("interference (red: cancel, blue: add up)", diverging=True)
COMPRESSION = {
    "rank": Scale("rank after the compression"),
    "error": Scale("relative error of the compression"),
}


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
    maps = [
        *_cosine_maps(report["pairs"], layers),
        *_size_maps(report["adapters"], layers),
        LayerMap(
            "all adapters",
            INTERFERENCE,
            {path: facts["interference"] for path, facts in layers.items()},
        ),
    ]
    for name, scale in COMPRESSION.items():
        if any(name in facts for facts in layers.values()):
            values = {path: facts.get(name, math.nan) for path, facts in layers.items()}
            maps.append(LayerMap(name, scale, values))
    heat_maps([each for each in maps if each.values], file)


def _cosine_maps(
    pairs: Iterable[Mapping[str, Any]], layers: Mapping[str, Mapping[str, Any]]
) -> list[LayerMap]:
    """Return the cosine of each pair of adapters in the layers that both change."""
    maps = []
    for pair in pairs:
        name = " + ".join(pair["adapters"])
        values = {
            path: facts["cos"][name] for path, facts in layers.items() if name in facts["cos"]
        }
        maps.append(LayerMap(name, COSINE, values))
    return maps


def _size_maps(adapters: Iterable[str], layers: Mapping[str, Mapping[str, Any]]) -> list[LayerMap]:
    """Return the size of each adapter's change, relative to the weight."""
    maps = []
    for position, adapter in enumerate(adapters):
        sizes = {path: facts["relative"][position] for path, facts in layers.items()}
        values = {path: size for path, size in sizes.items() if size is not None}
        maps.append(LayerMap(adapter, SIZE, values))
    return maps
