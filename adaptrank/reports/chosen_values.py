"""Values that a study chose: the best point of a grid, and values at the edge of those tried."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptrank.reports.comparison import Row, grid_texts, setting_label

NEAR = 0.05
"""Share of a range of learning rates, on the logarithmic scale, that counts as its edge."""


def chosen_values(record: Mapping[str, Any], table: Sequence[Row]) -> list[str]:
    """Return sentences about chosen values: the best of a grid, and what lies at an edge.

    A value at the edge of its grid may be worse than one that was not tried.

    Args:
        record: results of a study.
        table: its rows, see `comparison.rows`.
    """
    return [*_best_points(record, table), *_edges_of_rates(record, table)]


def _edges_of_rates(record: Mapping[str, Any], table: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence for each row whose selected learning rate lies at an edge."""
    for row in table:
        if row["lr"] is None or "metric" not in row:
            continue
        end = _end_of_rates(record, row["lr"])
        if end is not None:
            yield f"{setting_label(row)}: the chosen learning rate {row['lr']:g} is {end}"


def _end_of_rates(record: Mapping[str, Any], rate: float) -> str | None:
    """Return at which end of the rates that were tried a rate lies, with the advice, or None."""
    search = record.get("search")
    if search:
        low, high = math.log(search["low"]), math.log(search["high"])
        share = (math.log(rate) - low) / (high - low)
        ends = (share <= NEAR, share >= 1 - NEAR)
        names = ("at the lower end of the search", "at the upper end of the search")
    elif len(record["lrs"]) > 1:
        ends = (rate <= min(record["lrs"]), rate >= max(record["lrs"]))
        names = ("the smallest that was tried", "the largest that was tried")
    else:
        return None
    if ends[0]:
        return f"{names[0]}. Try smaller ones."
    return f"{names[1]}. Try larger ones." if ends[1] else None


def _best_points(record: Mapping[str, Any], table: Sequence[Row]) -> Iterator[str]:
    """Yield the best point of the grid of each method, allocator and budget, and its edges."""
    grid = record.get("grid") or {}
    if not grid:
        return
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in table:
        if row["grid"] and "metric" in row:
            key = (row["method"], row["allocator"], row["budget"])
            groups.setdefault(key, []).append(row)
    for rows in groups.values():
        best = (max if record["mode"] == "max" else min)(rows, key=lambda row: row["metric"])
        yield _best_sentence(record, rows, best)
        yield from _edges_of_grid(grid, best)


def _best_sentence(record: Mapping[str, Any], rows: Sequence[Row], best: Row) -> str:
    setting = setting_label({**best, "grid": {}})
    values = ", ".join(grid_texts(best["grid"]))
    return (
        f"{setting}: the best of {len(rows)} points by {record['metric']} is "
        f"{values} ({best['metric']:.4f}). It was chosen on the data that is reported on."
    )


def _edges_of_grid(grid: Mapping[str, Sequence[Any]], best: Row) -> Iterator[str]:
    """Yield a sentence for each number of the best point that is the least or largest tried."""
    names = dict(zip(best["grid"], grid_texts(best["grid"]), strict=True))
    for key, value in best["grid"].items():
        tried = [v for v in grid.get(key, []) if isinstance(v, int | float) and v is not True]
        if value not in tried or len(tried) < 2:
            continue
        if value == max(tried):
            yield f"{names[key]} is the largest that was tried. Try larger ones."
        elif value == min(tried):
            yield f"{names[key]} is the smallest that was tried. Try smaller ones."
