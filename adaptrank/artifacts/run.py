"""Files of a training run: metrics, events, ranks, the adapter, and a summary."""

import json
import logging
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from adaptrank._errors import UserError
from adaptrank._files import append_text, write_json
from adaptrank.artifacts.adapter import save_adapter
from adaptrank.artifacts.best_checkpoint import (
    Inherited,
    best_checkpoint,
    inherited_ranking,
    load_best,
    moves_left,
    ranking_callback,
    restart_ranking,
)
from adaptrank.artifacts.summary import base_of, render, summarize
from adaptrank.axes import cost_model, rank_axes
from adaptrank.parameterizations import adapted_part, wrapped_layers

log = logging.getLogger("adaptrank")

__all__ = [
    "JsonlLogger",
    "RunFiles",
    "base_of",
    "discard_unbegun",
    "new_run_folder",
    "render",
    "round_events",
    "summarize",
    "write_json",
]


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
        append_text(self._folder / "metrics.jsonl", json.dumps({"step": step, **metrics}) + "\n")

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the run's config.yaml has all hyperparameters."""


class RunFiles(Callback):
    """A callback that writes the ranks, the rounds and the adapter of a run.

    `ranks.jsonl` gets a line for each event of an allocator, and `rounds.jsonl` one for each round
    of a training strategy. `ranks.json` and the adapter are written when training
    ends or is interrupted. For a model without wrappers they are not written.

    Args:
        folder: the run folder.
        save: whether the adapter holds the "best" weights by a ModelCheckpoint's metric, or those
            of the "last" step. None means the best ones as soon as a ModelCheckpoint has a metric.
            Steps before the allocator's last event are not ranked, so that the budget holds.
    """

    def __init__(self, folder: Path, save: Literal["best", "last"] | None = None) -> None:
        self.folder = folder
        self.save = save
        self.saved: dict[str, Any] = {}
        """Facts about the saved weights: "weights", "step", "of", and the metric of the best."""
        self.started = 0.0
        self.seconds = 0.0
        self._written = self._rounds_written = 0
        self._moving = False
        self._inherited: Inherited = {}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._inherited = inherited_ranking(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()
        self._moving = moves_left(trainer)
        axes = rank_axes(adapted_part(pl_module))
        titles = _titles_of_allocators(trainer)
        if axes and titles and not trainer.global_step and trainer.is_global_zero:
            sizes = {key: len(axis) for key, axis in axes.items()}
            parameters = cost_model(adapted_part(pl_module)).total(sizes)
            self._append([_start_event(sizes, parameters, titles)])
        self._write_rounds(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        events: list[Any] = []
        for callback in _callbacks(trainer):
            events += getattr(callback, "events", ())
        if len(events) > self._written and trainer.is_global_zero:
            self._append(events[self._written :])
        self._written = len(events)
        self._write_rounds(trainer)
        if self._moving and not moves_left(trainer):
            self._moving = False
            self._inherited = {}
            restart_ranking(trainer)

    def _write_rounds(self, trainer: Trainer) -> None:
        rounds = round_events(trainer)
        if len(rounds) > self._rounds_written and trainer.is_global_zero:
            self._append(rounds[self._rounds_written :], "rounds.jsonl")
        self._rounds_written = len(rounds)

    def _append(self, events: Sequence[Any], file: str = "ranks.jsonl") -> None:
        lines = "".join(json.dumps(event) + "\n" for event in events)
        append_text(self.folder / file, lines)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started
        if not self._ranks(trainer):
            self._save(trainer, pl_module, "last")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here no other callback saves the weights any more.
        if self._ranks(trainer):
            self._save_best(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not (isinstance(exception, KeyboardInterrupt) and trainer.global_step):
            return
        try:
            self._save(trainer, pl_module, "last")
        except UserError as error:
            log.warning("No adapter is saved: %s", error)

    def _ranks(self, trainer: Trainer) -> bool:
        """Return whether the best weights are asked for, and a ModelCheckpoint ranks steps."""
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        return self.save != "last" and ranking_callback(trainer) is not None and not dry

    def _save_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the best weights and write them, or write the last ones and say why."""
        callback = ranking_callback(trainer)
        assert callback is not None
        best = best_checkpoint(trainer, self._inherited)
        if best is None:
            where = " after the allocator's last event" if self._moving else ""
            self._save_last_instead(
                trainer, pl_module, f"No step{where} was ranked by {callback.monitor}"
            )
            return
        try:
            step = load_best(pl_module, best)
        except UserError as error:
            self._save_last_instead(trainer, pl_module, str(error))
            return
        metric = {"monitor": best.monitor, "mode": best.mode, "value": best.value}
        self._save(trainer, pl_module, "best", step, metric)

    def _save_last_instead(self, trainer: Trainer, pl_module: LightningModule, reason: str) -> None:
        if trainer.is_global_zero:
            log.warning("%s: the adapter holds the last step, %d.", reason, trainer.global_step)
        self._save(trainer, pl_module, "last")

    def _save(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        weights: Literal["best", "last"],
        step: int | None = None,
        metric: Mapping[str, Any] | None = None,
    ) -> None:
        of = trainer.global_step
        self.saved = {
            "weights": weights,
            "step": of if step is None else step,
            "of": of,
            **(metric or {}),
        }
        model = adapted_part(pl_module)
        if not wrapped_layers(model):
            return
        save_adapter(model, self.folder / "adapter", base_of(pl_module), run=self.saved)
        ranks = {key: len(axis) for key, axis in rank_axes(model).items()}
        if ranks and trainer.is_global_zero:
            write_json(self.folder / "ranks.json", ranks)


def round_events(trainer: Trainer) -> list[dict[str, Any]]:
    """Return what happened at the start of each round of a training strategy so far."""
    events: list[dict[str, Any]] = []
    for callback in _callbacks(trainer):
        events += getattr(callback, "round_events", ())
    return events


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _titles_of_allocators(trainer: Trainer) -> list[str]:
    """Return the names of all callbacks that have events, with their variants."""
    return [
        str(getattr(callback, "title", type(callback).__name__))
        for callback in _callbacks(trainer)
        if hasattr(callback, "events")
    ]


def _start_event(
    sizes: Mapping[str, int], parameters: int, titles: Sequence[str]
) -> dict[str, Any]:
    """Return the first line of `ranks.jsonl`, in the form of an allocator's event."""
    total = sum(sizes.values())
    return {
        "step": 0,
        "reason": "the start",
        "allocators": titles,
        "sizes": sizes,
        "active": total,
        "allocated": total,
        "parameters": parameters,
        "allocated_parameters": parameters,
        "pruned": {},
        "grown": {},
        "closed": {},
    }
