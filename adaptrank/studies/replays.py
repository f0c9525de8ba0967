"""Points that start from what another point found. They run after the other one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrank.studies.design import Point
from adaptrank.studies.overlays import map_texts
from adaptrank.studies.references import REFERENCE


def with_replay(point: Point, results: Sequence[Mapping[str, Any]]) -> Point:
    """Return the point with files and folders of other runs in place of its references.

    If another run is not among the results or failed, the reference stays. The run of the point
    then fails, and says that there is no such file.
    """

    def fill(text: str) -> str:
        reference = REFERENCE.fullmatch(text)
        source = None if reference is None else _source(point, reference, results)
        if reference is None or source is None:
            return text
        folder = Path(source["run"])
        return str(folder if reference["what"] == "run" else folder / "ranks.json")

    return replace(point, config=map_texts(point.config, fill))


def _source(
    point: Point, reference: re.Match[str], results: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Return the result of the run that a reference means, if that run succeeded."""
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
