"""A model card beside an adapter: what it was trained on and how, what came out, and what its ranks are. Pure: data in, Markdown out."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from adaptrank.reports.ranks import grid

CARD = "README.md"


def card(summary: Mapping[str, Any], ranks: Mapping[str, int], config: str) -> str:
    """The card of a run as Markdown with the front matter that the Hub reads.

    Args:
        summary: of the run, as `summary.json` has it.
        ranks: axis -> units at the end; empty for methods without ranks.
        config: the run's configuration, as YAML.
    """
    base = summary["base"].get("name")
    methods = ", ".join(dict.fromkeys(row["method"] for row in summary["layers"]))
    matter = {
        "library_name": "adaptrank",
        **({"base_model": base} if base and not os.path.isabs(base) else {}),
        "tags": [
            "adapter",
            "peft",
            *dict.fromkeys(
                name for row in summary["layers"] for name in row["method"].split(" on ")
            ),
        ],
    }
    shown = f"`{base}`" if base else "an unnamed base"
    share = summary["trainable"] / summary["parameters"] if summary["parameters"] else 0.0
    names = [name for name in summary["after"] if not name.startswith(("ranks/", "spectral/"))]
    metrics = [
        f"| {name} | {_number(summary['before'].get(name))} | {_number(summary['after'][name])} |"
        for name in names
        if not name.startswith("train_")
    ]
    layers = [
        f"| {row['kind']} | {row['count']} | {row['method']} | {row['trainable']:,} |"
        for row in summary["layers"]
    ]
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n",
        f"# {methods} on {shown}\n",
        f"{summary['trainable']:,} trainable of {summary['parameters']:,} parameters ({share:.2%}); {summary['steps']} optimizer steps in "
        f"{summary['seconds'] / 60:.1f} minutes.\n",
        "```python\nfrom transformers import "
        + (summary["base"].get("auto_class") or "AutoModel")
        + f"\n\nfrom adaptrank import load_adapter\n\nmodel = {summary['base'].get('auto_class') or 'AutoModel'}.from_pretrained({base!r})\n"
        'load_adapter(model, "path/to/this/folder")\n```\n',
    ]
    if metrics:
        parts.append(
            "## Results\n\n| metric | before | after |\n|---|---|---|\n" + "\n".join(metrics) + "\n"
        )
    parts.append(
        "## Layers\n\n| kind | layers | method | trainable |\n|---|---|---|---|\n"
        + "\n".join(layers)
        + "\n"
    )
    if ranks:
        parts.append(
            f"## Ranks\n\n{sum(ranks.values()):,} units on {len(ranks)} axes.\n\n{rank_map(ranks)}\n"
        )
    parts.append(f"## Configuration\n\n```yaml\n{config.strip()}\n```\n")
    return "\n".join(parts)


def rank_map(ranks: Mapping[str, int]) -> str:
    """A table of units, layer over kind."""
    rows, columns, place = grid(list(ranks))
    cells = [["" for _ in columns] for _ in rows]
    for axis, size in ranks.items():
        row, column = place[axis]
        cells[row][column] = str(size)
    head = f"| layer | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    return head + "\n".join(
        f"| {name} | {' | '.join(row)} |" for name, row in zip(rows, cells, strict=True)
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def write_card(
    folder: Path, summary: Mapping[str, Any], ranks: Mapping[str, int], config: str
) -> None:
    """Write the card into an adapter's folder, whole or not at all."""
    growing = folder / f".{CARD}.{os.getpid()}"
    growing.write_text(card(summary, ranks, config), encoding="utf-8")
    os.replace(growing, folder / CARD)
