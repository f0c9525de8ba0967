"""The report of a composition as text."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def layer_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines for the terminal that sum up what happened to the layers."""
    layers = report["layers"].values()
    relative = [value for facts in layers for value in facts["relative"] if value is not None]
    if relative:
        yield f"|D| / |W| of the adapters: {min(relative):.1e} to {max(relative):.1e}"
    interference = [facts["interference"] for facts in layers]
    if interference:
        mean = sum(interference) / len(interference)
        yield (
            f"interference: mean {mean:+.4f}, {min(interference):+.4f} to {max(interference):+.4f}"
        )
    yield from _error_lines(report)
    ranks = [facts["rank"] for facts in layers if "rank" in facts]
    if ranks:
        yield f"ranks: {min(ranks)} to {max(ranks)} on {len(ranks)} layers"


def _error_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for name, words in (
        ("from_sum", "distance from the weighted sum"),
        ("error", "error of the compression"),
    ):
        values = [facts[name] for facts in report["layers"].values() if name in facts]
        if any(values):
            mean = sum(values) / len(values)
            yield f"{words}, relative: mean {mean:.4f}, largest {max(values):.4f}"


def report_json(report: Mapping[str, Any]) -> str:
    """Return the report as indented JSON."""
    return json.dumps(report, indent=2) + "\n"
