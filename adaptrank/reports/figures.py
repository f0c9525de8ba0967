"""Heat maps of numbers a layer: layer over kind. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path

from adaptrank.reports.ranks import grid


def heat_maps(
    maps: Mapping[str, Mapping[str, float]], file: Path, diverging: frozenset[str] = frozenset()
) -> None:
    """One panel for each map, as a PNG.

    Args:
        maps: title -> {layer: number}; layers without one stay blank.
        file: to write.
        diverging: titles of maps whose zero is the middle of the colours.
    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures need matplotlib: pip install 'adaptrank[report]'."
        ) from error
    import numpy as np

    rows, columns, place = grid([f"{layer}:" for values in maps.values() for layer in values])
    across = min(3, len(maps))
    down = -(-len(maps) // across)
    width, height = max(3.2, 0.55 * len(columns) + 1.8), max(2.4, 0.17 * len(rows) + 1.6)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, (title, values) in zip(panels, maps.items(), strict=False):
        cells = np.full((len(rows), len(columns)), np.nan)
        for layer, value in values.items():
            cells[place[f"{layer}:"]] = value
        most = float(np.nanmax(np.abs(cells))) if np.isfinite(cells).any() else 1.0
        limits = (
            {"cmap": "RdBu_r", "vmin": -most or -1, "vmax": most or 1}
            if title in diverging
            else {"cmap": "viridis"}
        )
        image = panel.imshow(cells, aspect="auto", **limits)
        figure.colorbar(image, ax=panel, shrink=0.8)
        panel.set_title(title, fontsize=9)
        panel.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
        steps = range(0, len(rows), -(-len(rows) // 16))
        panel.set_yticks(steps, [rows[i] for i in steps], fontsize=7)
        panel.set_ylabel("layer", fontsize=8)
    for panel in panels[len(maps) :]:
        panel.set_axis_off()
    figure.savefig(file, dpi=120)
