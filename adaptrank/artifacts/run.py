"""What a training run leaves in its folder: metrics, events, ranks, the adapter, and a summary on one screen."""

import json
import os
import resource
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from adaptrank.artifacts.adapter import save_adapter
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import adapted_part, wrapped_layers


def new_run_folder(parent: Path) -> Path:
    """Make and return `parent/<n>` with the next free number; two runs at once never share one."""
    number = (
        max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=-1) + 1
        if parent.is_dir()
        else 0
    )
    while True:
        try:
            (parent / str(number)).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return parent / str(number)


def discard_unbegun(folder: Path | None) -> None:
    """Remove the folder of a run that failed before its first step, and parents that it leaves empty; files of others stay."""
    if folder is None or not folder.is_dir():
        return
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for empty in (folder / "checkpoints", folder, folder.parent, folder.parent.parent):
        try:
            empty.rmdir()
        except OSError:  # not empty, or never made
            continue


class JsonlLogger(Logger):
    """A Lightning logger that appends a line of JSON to `metrics.jsonl` for every logged step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    @property
    def name(self) -> str:
        """Empty: Lightning appends name and version to `save_dir`, which has both already."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as `name` is."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder: a ModelCheckpoint without a `dirpath` writes to its `checkpoints`."""
        return str(self._folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """The run's config.yaml has them all."""


class RunFiles(Callback):
    """Writes `ranks.jsonl` as events happen, and `ranks.json` and the adapter when training ends, however it ends.

    A model without wrappers has no adapter, and none is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written = 0
        self.started = 0.0
        self.seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()
        axes = rank_axes(adapted_part(pl_module))
        allocates = any(hasattr(c, "events") for c in trainer.callbacks)  # type: ignore[attr-defined]
        if axes and allocates and not trainer.global_step and trainer.is_global_zero:
            sizes = {key: len(axis) for key, axis in axes.items()}
            start = {
                "step": 0,
                "reason": "the start",
                "sizes": sizes,
                "active": sum(sizes.values()),
            }
            self._append(
                [
                    {
                        **start,
                        "allocated": sum(sizes.values()),
                        "pruned": {},
                        "grown": {},
                        "closed": {},
                    }
                ]
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        events = [event for c in trainer.callbacks for event in getattr(c, "events", ())]  # type: ignore[attr-defined]
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
        if trainer.is_global_zero and (axes := rank_axes(model)):
            write_json(self.folder / "ranks.json", {key: len(axis) for key, axis in axes.items()})


def base_of(module: LightningModule) -> dict[str, Any]:
    """What a module says of its frozen model; nothing, for a module of another kind than ours."""
    describe: Callable[[], dict[str, Any]] | None = getattr(module, "describe_base", None)
    return {} if describe is None else describe()


def write_json(file: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def parameter_table(model: nn.Module) -> list[tuple[str, int, str, int]]:
    """(kind of layer, number of layers, nest of methods, trainable parameters), in the order of the model.

    The last rows are modules that train whole. A tied tensor counts once, where it is first met.
    """
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    seen: set[int] = set()
    for path, layer in wrapped_layers(model).items():
        row = rows[
            path.rsplit(".", 1)[-1], " on ".join(type(w).__name__ for w in reversed(layer.nest))
        ]
        row[0] += 1
        for wrapper in layer.nest:
            for _, p in wrapper.own_parameters():
                if p.requires_grad and id(p) not in seen:
                    seen.add(id(p))
                    row[1] += p.numel()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            row = rows[name.rpartition(".")[0], "trained whole"]
            row[0] = 1
            row[1] += parameter.numel()
    return [(kind, count, nest, trainable) for (kind, nest), (count, trainable) in rows.items()]


def peak_memory() -> int:
    """Most memory the process has held so far, in bytes: of the accelerator where there is one, else resident."""
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
    """The figures of a run, as `summary.json` holds them."""
    model = adapted_part(module)
    table = parameter_table(model)
    return {
        "base": base_of(module),
        "layers": [{"kind": k, "count": c, "method": n, "trainable": t} for k, c, n, t in table],
        "trainable": sum(row[3] for row in table),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ranks": sum(len(axis) for axis in rank_axes(model).values()),
        "before": dict(before),
        "after": dict(after),
        "steps": steps,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
    }


def render(summary: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """A summary as text, one screen at most: layers, metrics before and after, time and memory.

    `ranks/*`, which an allocator logs at its events, are no metrics of the evaluation and are left out.
    """
    kinds, rest = summary["layers"][:12], summary["layers"][12:]
    layers = [
        [row["kind"], f"{row['count']} x", row["method"], f"{row['trainable']:,}"] for row in kinds
    ]
    if rest:
        layers.append(
            [f"and {len(rest)} more kinds", "", "", f"{sum(row['trainable'] for row in rest):,}"]
        )
    shown = [name for name in names if name in summary["after"] and not name.startswith("ranks/")]
    metrics = [["", "before", "after"]]
    for name in shown:
        pair = (summary["before"].get(name), summary["after"][name])
        metrics.append([name, *("" if value is None else f"{value:.4f}" for value in pair)])
    width = max(len(row[0]) for row in [*layers, *metrics])
    lines = _aligned(layers, "<><>", [width, 6, 24, 12])
    share = (
        f" ({summary['trainable'] / summary['parameters']:.2%})" if summary["parameters"] else ""
    )
    ranks = f", {summary['ranks']} ranks" if summary["ranks"] else ""
    lines.append(
        f"  trainable {summary['trainable']:,} of {summary['parameters']:,} parameters{share}{ranks}"
    )
    if shown:
        lines += ["", *_aligned(metrics, "<>>", [width, 10, 10])]
    minutes, rest_seconds = divmod(round(summary["seconds"]), 60)
    memory = summary["peak_memory_bytes"] / 2**30
    lines.append("")
    lines.append(
        f"  {summary['steps']} steps in {minutes}:{rest_seconds:02} min, peak memory {memory:.2f} GiB"
    )
    return "\n".join(lines)


def _aligned(rows: list[list[str]], sides: str, least: list[int]) -> list[str]:
    """Lines of columns, each as wide as its widest cell and at least so wide; a side is `<` for text, `>` for figures."""
    widths = (
        [max(minimum, *(len(row[i]) for row in rows)) for i, minimum in enumerate(least)]
        if rows
        else least
    )
    return [
        "  "
        + " ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
