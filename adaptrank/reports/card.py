"""A model card beside an adapter: its training, its results, its layers and its ranks."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from adaptrank._files import write_text
from adaptrank.reports.card_mark import mark_card
from adaptrank.reports.escaping import code_span, fence, markdown
from adaptrank.reports.layer_grid import layer_grid
from adaptrank.reports.rendering import render

CARD = "README.md"

HIDDEN_METRICS = ("ranks/", "spectral/", "train_")
"""Beginnings of the names of metrics that a card leaves out."""


def card(summary: Mapping[str, Any], ranks: Mapping[str, int], config: str) -> str:
    """Return the card of a run as Markdown, with the front matter that the Hub reads.

    Args:
        summary: summary of the run, as in `summary.json`.
        ranks: axis -> units at the end. Empty for methods without ranks.
        config: configuration of the run, as YAML.
    """
    base = summary["base"].get("name")
    methods = dict.fromkeys(row["method"] for row in summary["layers"])
    return render(
        "card.md.j2",
        front_matter=yaml.safe_dump(_front_matter(base, methods), sort_keys=False),
        methods=markdown(", ".join(methods)),
        base=code_span(base) if base else "an unnamed base",
        base_argument=repr(base),
        auto_class=_class_name(summary["base"].get("auto_class")),
        size=_size(summary),
        metrics=metric_rows(summary),
        layers=[_layer_row(row) for row in summary["layers"]],
        ranks=ranks,
        rank_map=rank_map(ranks),
        fence=fence(config),
        config=config.strip(),
    )


def rank_map(ranks: Mapping[str, int]) -> str:
    """Return a Markdown table of units: one row a layer, one column a kind of layer."""
    grid = layer_grid(list(ranks))
    cells = [[""] * len(grid.kinds) for _ in grid.layers]
    for axis, size in ranks.items():
        row, column = grid.places[axis]
        cells[row][column] = str(size)
    kinds = " | ".join(map(markdown, grid.kinds))
    lines = [f"| layer | {kinds} |", f"|---|{'---|' * len(grid.kinds)}"]
    for layer, row_cells in zip(grid.layers, cells, strict=True):
        lines.append(f"| {markdown(layer)} | {' | '.join(row_cells)} |")
    return "\n".join(lines)


def write_card(
    folder: Path, summary: Mapping[str, Any], ranks: Mapping[str, int], config: str
) -> None:
    """Write the card into the folder of an adapter. The arguments are those of `card`."""
    write_text(folder / CARD, mark_card(card(summary, ranks, config)))


def _front_matter(base: str | None, methods: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the Hub reads. A base that is a folder of this machine is not named."""
    matter: dict[str, Any] = {"library_name": "adaptrank"}
    if base and not os.path.isabs(base):
        matter["base_model"] = base
    tags: dict[str, None] = {}
    for nest in methods:
        tags |= dict.fromkeys(nest.split(" on "))
    matter["tags"] = ["adapter", "peft", *tags]
    return matter


def _size(summary: Mapping[str, Any]) -> str:
    """Return a sentence about parameters, steps and time."""
    trainable, parameters = summary["trainable"], summary["parameters"]
    share = trainable / parameters if parameters else 0.0
    minutes = summary["seconds"] / 60
    return (
        f"{trainable:,} trainable of {parameters:,} parameters ({share:.2%}); "
        f"{summary['steps']} optimizer steps in {minutes:.1f} minutes."
    )


def _class_name(name: Any) -> str:
    """Return the class of transformers that loads the base, if it is the name of a class."""
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"


def _layer_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table of layers, with its texts escaped."""
    return {**row, "kind": markdown(row["kind"]), "method": markdown(row["method"])}


def metric_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return name, value before and value after the training of each metric."""
    return [
        {
            "name": markdown(name),
            "before": _number(summary["before"].get(name)),
            "after": _number(after),
        }
        for name, after in summary["after"].items()
        if not name.startswith(HIDDEN_METRICS)
    ]


def layer_counts(layers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return kind, method and number of layers, of {path: method}. A kind is the last component."""
    counts: Counter[tuple[str, str]] = Counter()
    for path, method in layers.items():
        counts[path.rpartition(".")[2], method] += 1
    return [
        {"kind": markdown(kind), "method": markdown(method), "count": count}
        for (kind, method), count in counts.items()
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
