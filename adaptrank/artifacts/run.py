"""Files of a training run: metrics, events, ranks, the adapter, and a summary on one screen."""

import json
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from adaptrank._files import write_json as write_json
from adaptrank.artifacts.adapter import save_adapter
from adaptrank.artifacts.planning import by_layer
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import adapted_part, adapter_parameters, wrapped_layers


def new_run_folder(parent: Path) -> Path:
    """Make and return `parent/<n>` with the next free number. Two runs at once never share one."""
    entries = parent.iterdir() if parent.is_dir() else ()
    number = max((int(entry.name) for entry in entries if entry.name.isdigit()), default=-1) + 1
    while True:
        folder = parent / str(number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def discard_unbegun(folder: Path | None) -> None:
    """Remove the folder of a run that failed before its first step.

    Parents that are then empty go as well. Files that the run did not write stay.
    """
    if folder is None or not folder.is_dir():
        return
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for candidate in (folder / "checkpoints", folder, folder.parent, folder.parent.parent):
        try:
            candidate.rmdir()
        except OSError:
            # The folder is not empty, or does not exist.
            continue


class JsonlLogger(Logger):
    """A Lightning logger that appends a line of JSON to `metrics.jsonl` for every logged step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    @property
    def name(self) -> str:
        """Empty, because Lightning appends name and version to `save_dir`, which has both."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as `name` is."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder. A ModelCheckpoint without a `dirpath` writes to its `checkpoints`."""
        return str(self._folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the run's config.yaml has all hyperparameters."""


class RunFiles(Callback):
    """A callback that writes the ranks and the adapter of a run.

    `ranks.jsonl` gets a line for each event. `ranks.json` and the adapter are written when training
    ends or is interrupted. For a model without wrappers they are not written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written = 0
        self.started = 0.0
        self.seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()
        axes = rank_axes(adapted_part(pl_module))
        allocates = any(hasattr(callback, "events") for callback in _callbacks(trainer))
        if axes and allocates and not trainer.global_step and trainer.is_global_zero:
            self._append([_start_event({key: len(axis) for key, axis in axes.items()})])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        events: list[Any] = []
        for callback in _callbacks(trainer):
            events += getattr(callback, "events", ())
        if len(events) > self._written and trainer.is_global_zero:
            self._append(events[self._written :])
        self._written = len(events)

    def _append(self, events: Sequence[Any]) -> None:
        with (self.folder / "ranks.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started
        self._save(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = adapted_part(pl_module)
        if not wrapped_layers(model):
            return
        save_adapter(model, self.folder / "adapter", base_of(pl_module))
        ranks = {key: len(axis) for key, axis in rank_axes(model).items()}
        if ranks and trainer.is_global_zero:
            write_json(self.folder / "ranks.json", ranks)


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _start_event(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the first line of `ranks.jsonl`, in the form of an allocator's event."""
    total = sum(sizes.values())
    return {
        "step": 0,
        "reason": "the start",
        "sizes": sizes,
        "active": total,
        "allocated": total,
        "pruned": {},
        "grown": {},
        "closed": {},
    }


def base_of(module: LightningModule) -> dict[str, Any]:
    """Return a module's facts about its frozen model, or {} if it has no `describe_base`."""
    describe: Callable[[], dict[str, Any]] | None = getattr(module, "describe_base", None)
    return {} if describe is None else describe()


def parameter_table(model: nn.Module) -> list[tuple[str, int, str, int]]:
    """List (kind of layer, number of layers, methods, trainable parameters) in the model's order.

    A kind is the last component of the path. The last rows are modules that train whole. A tied
    tensor counts in the first row that has it.
    """
    trainable = by_layer(model)
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for path, layer in wrapped_layers(model).items():
        methods = " on ".join(type(wrapper).__name__ for wrapper in reversed(layer.nest))
        row = path.rsplit(".", 1)[-1], methods
        layers, parameters = rows.get(row, (0, 0))
        rows[row] = layers + 1, parameters + trainable.get(path, 0)

    adapter_ids = {id(parameter) for parameter in adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapter_ids:
            row = name.rpartition(".")[0], "trained whole"
            _, parameters = rows.get(row, (0, 0))
            rows[row] = 1, parameters + parameter.numel()
    return [(kind, layers, methods, count) for (kind, methods), (layers, count) in rows.items()]


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
) -> dict[str, Any]:
    """Return the figures of a run, as `summary.json` holds them.

    Args:
        module: the trained module.
        before: metrics before training.
        after: metrics after training.
        steps: number of optimizer steps.
        seconds: duration of training.
    """
    model = adapted_part(module)
    layers = [
        {"kind": kind, "count": count, "method": methods, "trainable": trainable}
        for kind, count, methods, trainable in parameter_table(model)
    ]
    return {
        "base": base_of(module),
        "layers": layers,
        "trainable": sum(row["trainable"] for row in layers),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ranks": sum(len(axis) for axis in rank_axes(model).values()),
        "before": dict(before),
        "after": dict(after),
        "steps": steps,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
    }


MOST_ROWS = 12
"""Kinds of layers that a rendered summary lists. Further kinds are one row together."""


def render(summary: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return a summary as text: layers, metrics before and after, time and memory.

    It has one screen at most.

    Args:
        summary: see `summarize`.
        names: metrics to show. `ranks/*`, which an allocator logs at its events, are left out.
    """
    layers = _layer_rows(summary["layers"])
    metrics = _metric_rows(summary, names)
    width = max(len(row[0]) for row in [*layers, *metrics])
    lines = _aligned(layers, "<><>", [width, 6, 24, 12])
    lines.append(_total_line(summary))
    if len(metrics) > 1:
        lines += ["", *_aligned(metrics, "<>>", [width, 10, 10])]
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    memory = summary["peak_memory_bytes"] / 2**30
    lines.append("")
    lines.append(
        f"  {summary['steps']} steps in {minutes}:{seconds:02} min, peak memory {memory:.2f} GiB"
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
        if name in summary["after"] and not name.startswith("ranks/"):
            values = (summary["before"].get(name), summary["after"][name])
            rows.append([name, *("" if value is None else f"{value:.4f}" for value in values)])
    return rows


def _total_line(summary: Mapping[str, Any]) -> str:
    trainable, parameters = summary["trainable"], summary["parameters"]
    share = f" ({trainable / parameters:.2%})" if parameters else ""
    ranks = f", {summary['ranks']} ranks" if summary["ranks"] else ""
    return f"  trainable {trainable:,} of {parameters:,} parameters{share}{ranks}"


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
