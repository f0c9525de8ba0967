"""Points that start from the ranks of another point.

A text `$ranks:METHOD` or `$ranks:METHOD:ALLOCATOR` in a configuration stands for the file of the
final ranks of that run, with the same seed and budget. A point with such a text runs after the
other one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrank.studies.design import Point
from adaptrank.studies.overlays import map_texts

REFERENCE = re.compile(r"\$ranks:(?P<method>[^:]+)(:(?P<allocator>.+))?")


def replay_reference(point: Point) -> str | None:
    """Return the reference to another point in the configuration, or None if there is none."""
    return _first_reference(point.config)


def with_ranks(point: Point, results: Sequence[Mapping[str, Any]]) -> Point:
    """Return the point with the file of ranks in place of its reference.

    If the other run is not among the results or failed, the point stays as it is. Its run then
    fails, and says that there is no such file.
    """
    source = _source(point, results)
    if source is None:
        return point
    file = str(Path(source["run"]) / "ranks.json")
    config = map_texts(point.config, lambda text: file if REFERENCE.fullmatch(text) else text)
    return replace(point, config=config)


def without_replays(value: Any) -> Any:
    """Return a configuration without the keys whose values are references."""
    if isinstance(value, dict):
        return {
            key: without_replays(entry)
            for key, entry in value.items()
            if not (isinstance(entry, str) and REFERENCE.fullmatch(entry))
        }
    if isinstance(value, list):
        return [without_replays(entry) for entry in value]
    return value


def _source(point: Point, results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the result of the run that the point refers to, if that run succeeded."""
    reference = REFERENCE.fullmatch(replay_reference(point) or "")
    assert reference is not None
    method, allocator = reference["method"], reference["allocator"] or "none"
    for result in results:
        same_run = (
            (result.get("grid") or {}) == dict(point.grid)
            and result["method"] == method
            and result["allocator"] == allocator
            and result["seed"] == point.seed
            and result["budget"] in (point.budget, None)
        )
        if same_run and result["status"] == "success":
            return result
    return None


def _first_reference(value: Any) -> str | None:
    """Return the first text of plain data that is a reference."""
    if isinstance(value, str):
        return value if REFERENCE.fullmatch(value) else None
    entries: list[Any] = []
    if isinstance(value, Mapping):
        entries = list(value.values())
    elif isinstance(value, list):
        entries = value
    references = (_first_reference(entry) for entry in entries)
    return next((reference for reference in references if reference is not None), None)
