"""Parts of a study file that say what is varied or tried."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptrank.studies.key_paths import Accepts, find_place, set_place
from adaptrank.studies.overlays import Config

Require = Callable[[bool, str], None]
"""(condition, mistake): refuses a study file unless the condition holds."""

SEARCH_KEYS = ("trials", "low", "high", "seed")
SELECTION_KEYS = ("overlay", "metric", "mode", "name", "seeds")
SUM_KEYS = ("of", "like", "method", "weights", "options")

GridPoint = tuple[tuple[str, Any], ...]
"""(key, value) of each key of a grid."""


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[GridPoint]:
    """Return every combination of the values of a grid. Without a grid it is one empty one."""
    columns = [[(key, value) for value in values] for key, values in grid.items()]
    return list(itertools.product(*columns))


def set_grid_point(config: Config, point: GridPoint, accepts: Accepts | None) -> Config:
    """Return the configuration with the values of a grid point.

    Raises:
        UserError: if a key leads to no place.
    """
    for key, value in point:
        config = set_place(config, find_place(config, key, accepts), value)
    return config


def check_grid(grid: Any, require: Require) -> None:
    """Refuse a grid that is no mapping of keys to lists of different values."""
    require(isinstance(grid, dict), "grid is a table of keys and lists of values")
    for key, values in grid.items():
        require(isinstance(values, list) and bool(values), f"grid: {key} needs a list of values")
        texts = [repr(value) for value in values]
        require(len(set(texts)) == len(texts), f"grid: {key} has the same value twice")


def check_selection(selection: Any, require: Require) -> None:
    """Refuse a selection with an unknown key, another mode than max and min, or wrong seeds."""
    keys = ", ".join(SELECTION_KEYS)
    require(isinstance(selection, dict), f"selection is a table with {keys}")
    for key in selection:
        require(key in SELECTION_KEYS, f"selection: {key!r} is none of {keys}")
    mode = selection.get("mode", "min")
    require(mode in ("max", "min"), f"selection: mode is 'max' or 'min', not {mode!r}")
    if "seeds" in selection:
        seeds = selection["seeds"]
        are_seeds = isinstance(seeds, list) and bool(seeds) and all(map(_is_whole, seeds))
        require(are_seeds, "selection: seeds is a list of whole numbers")
        require(len(set(seeds)) == len(seeds), "selection: seeds has the same number twice")


def check_search(search: Any, lrs: Sequence[float], can_select: bool, require: Require) -> None:
    """Refuse a search without trials or bounds, or beside a list of rates."""
    if not search:
        return
    require(isinstance(search, dict), f"search is a table with {', '.join(SEARCH_KEYS)}")
    for key in search:
        require(key in SEARCH_KEYS, f"search: {key!r} is none of {', '.join(SEARCH_KEYS)}")
    trials = search.get("trials")
    require(_is_whole(trials) and trials > 0, "search: trials is a number of runs, 1 or more")
    require(_is_whole(search.get("seed", 0)), "search: seed is a whole number")
    low, high = search.get("low"), search.get("high")
    bounds = all(_is_number(bound) and bound > 0 for bound in (low, high))
    require(bounds, "search: low and high are learning rates above 0, such as 0.0001 and 0.01")
    require(low < high, f"search: low {low} is not below high {high}")
    require(not lrs, "lrs and search both choose the learning rate: keep one")
    require(
        can_select,
        "a search needs a selection with an overlay, which names data that is not reported on, "
        "and a metric",
    )


def check_sums(sums: Any, methods: Mapping[str, Any], require: Require) -> None:
    """Refuse sums of methods that the study does not have."""
    require(isinstance(sums, dict), "sums is a table of names")
    for name, entry in sums.items():
        require(isinstance(entry, dict), f"sums: {name} is a table with {', '.join(SUM_KEYS)}")
        for key in entry:
            require(key in SUM_KEYS, f"sums: {name}: {key!r} is none of {', '.join(SUM_KEYS)}")
        require(name not in methods, f"sums: {name} is the name of a method as well")
        parts = entry.get("of")
        require(
            isinstance(parts, list) and len(parts) > 1,
            f"sums: {name}: of names two methods or more",
        )
        like = entry.get("like")
        for part in [*parts, *([like] if like is not None else [])]:
            require(part in methods, f"sums: {name}: {part!r} is none of the methods")
        weights = entry.get("weights")
        require(
            weights is None or (isinstance(weights, list) and len(weights) == len(parts)),
            f"sums: {name}: weights has one number for each of {len(parts)} methods",
        )
        require(all(map(_is_number, weights or [])), f"sums: {name}: weights are numbers")
        options = entry.get("options") or {}
        require(isinstance(options, dict), f"sums: {name}: options is a table")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
