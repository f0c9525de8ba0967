"""The summary of a run: parameters by kind of layer, metrics before and after, time and memory."""

import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from adaptrank.axes import rank_axes
from adaptrank.injection import parameter_table
from adaptrank.layers import count_numbers
from adaptrank.parameterizations import adapted_part, wrappers


def base_of(module: LightningModule) -> dict[str, Any]:
    """Return a module's facts about its frozen model, or {} if it has no `describe_base`."""
    describe: Callable[[], dict[str, Any]] | None = getattr(module, "describe_base", None)
    return {} if describe is None else describe()


def peak_memory() -> int:
    """Return the most memory that the process has held so far, in bytes.

    It is the accelerator's memory where there is one, else the resident memory.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summarize(
    module: LightningModule,
    before: Mapping[str, float],
    after: Mapping[str, float],
    steps: int,
    seconds: float,
    saved: Mapping[str, Any] | None = None,
    rounds: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the figures of a run, as `summary.json` holds them.

    Args:
        module: the trained module.
        before: metrics before training.
        after: metrics after training.
        steps: number of optimizer steps.
        seconds: duration of training.
        saved: which weights the adapter holds, see `RunFiles.saved`. The last ones by default.
        rounds: what happened at the start of each round, if a training strategy made rounds.
    """
    model = adapted_part(module)
    layers: list[dict[str, Any]] = [
        {"kind": kind, "count": count, "method": methods, "trainable": trainable}
        for kind, count, methods, trainable in parameter_table(model)
    ]
    figures: dict[str, Any] = {
        "base": base_of(module),
        "layers": layers,
        "trainable": sum(row["trainable"] for row in layers),
        "parameters": sum(count_numbers(parameter) for parameter in model.parameters()),
        "ranks": sum(len(axis) for axis in rank_axes(model).values()),
        "before": dict(before),
        "after": dict(after),
        "steps": steps,
        "seconds": seconds,
        "saved": dict(saved or {"weights": "last", "step": steps, "of": steps}),
        "peak_memory_bytes": peak_memory(),
    }
    if hasattr(module, "frozen_form"):
        figures["dtype"] = module.frozen_form
    if rounds:
        figures["rounds"] = _rounds(rounds, model)
    return figures


def _rounds(events: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, Any]:
    """Return the strategy, the steps and trained numbers of its rounds, and the stored numbers.

    The numbers that train in a round are fewer than those that the adapter stores at the end.
    """
    stored: dict[int, Tensor] = {}
    for wrapper in wrappers(model):
        stored |= {id(tensor): tensor for tensor in wrapper.own_tensors().values()}
    return {
        "strategy": events[-1]["strategy"],
        "starts": [event["step"] for event in events],
        "trained": [event["trained"] for event in events],
        "stored": sum(tensor.numel() for tensor in stored.values()),
    }


MOST_ROWS = 12
"""Kinds of layers that a rendered summary lists. Further kinds are one row together."""


def render(summary: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return a summary as text: layers, metrics before and after, time and memory.

    It has one screen at most.

    Args:
        summary: see `summarize`.
        names: metrics to show. `ranks/*` and `round`, which allocators and strategies log, are
            left out.
    """
    layers = _layer_rows(summary["layers"])
    metrics = _metric_rows(summary, names)
    width = max(len(row[0]) for row in [*layers, *metrics])
    lines = _aligned(layers, "<><>", [width, 6, 24, 12])
    lines.append(_total_line(summary))
    if "rounds" in summary:
        lines.append(_rounds_line(summary["rounds"]))
    if len(metrics) > 1:
        lines += ["", *_aligned(metrics, "<>>", [width, 10, 10])]
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    memory = summary["peak_memory_bytes"] / 2**30
    lines.append("")
    lines.append(
        f"  {summary['steps']} steps in {minutes}:{seconds:02} min, peak memory {memory:.2f} GiB"
    )
    saved = summary.get("saved", {})
    if saved.get("weights") == "best":
        lines.append(
            f"  the adapter and the figures after are those of step {saved['step']}, the best by "
            f"{saved['monitor']} ({saved['value']:.4f})"
        )
    return "\n".join(lines)


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [
        [row["kind"], f"{row['count']} x", row["method"], f"{row['trainable']:,}"]
        for row in layers[:MOST_ROWS]
    ]
    others = layers[MOST_ROWS:]
    if others:
        trainable = sum(row["trainable"] for row in others)
        rows.append([f"and {len(others)} more kinds", "", "", f"{trainable:,}"])
    return rows


def _metric_rows(summary: Mapping[str, Any], names: Iterable[str]) -> list[list[str]]:
    """Return a head, and a row for each metric that was computed after training."""
    rows = [["", "before", "after"]]
    for name in names:
        told_elsewhere = name == "round" or name.startswith("ranks/")
        if name in summary["after"] and not told_elsewhere:
            values = (summary["before"].get(name), summary["after"][name])
            rows.append([name, *("" if value is None else f"{value:.4f}" for value in values)])
    return rows


def _total_line(summary: Mapping[str, Any]) -> str:
    trainable, parameters = summary["trainable"], summary["parameters"]
    share = f" ({trainable / parameters:.2%})" if parameters else ""
    ranks = f", {summary['ranks']} ranks" if summary["ranks"] else ""
    return f"  trainable {trainable:,} of {parameters:,} parameters{share}{ranks}"


def _rounds_line(rounds: Mapping[str, Any]) -> str:
    trained = sorted(rounds["trained"])
    numbers = f"{trained[0]:,}"
    if trained[-1] != trained[0]:
        numbers += f" to {trained[-1]:,}"
    count = len(trained)
    return (
        f"  {rounds['strategy']}: {count} round{'s' if count > 1 else ''}, {numbers} numbers train "
        f"in a round, {rounds['stored']:,} are stored"
    )


def _aligned(rows: Sequence[Sequence[str]], sides: str, least: Sequence[int]) -> list[str]:
    """Return rows as lines of aligned columns.

    Args:
        rows: cells.
        sides: one character for each column: `<` for text, `>` for figures.
        least: least width of each column.
    """
    if not rows:
        return []
    columns = zip(*rows, strict=True)
    widths = [
        max(minimum, *map(len, column)) for minimum, column in zip(least, columns, strict=True)
    ]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths, strict=True)]
        lines.append("  " + " ".join(cells).rstrip())
    return lines
