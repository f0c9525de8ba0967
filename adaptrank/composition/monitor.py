"""A callback that logs the spectra of the changes while they are trained."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from adaptrank import layers as kinds
from adaptrank._collectives import first
from adaptrank._files import append_text
from adaptrank.composition.changes import change_of
from adaptrank.composition.spectral import COLUMNS, diagnose, mean_by_kind
from adaptrank.parameterizations import Parameterization, wrapped_layers


class SpectralMonitor(Callback):
    """Log the size and the ranks of W' - W whenever validation ends.

    Names in the log are `spectral/<kind>/<measure>`, of means over the layers of each kind. The
    kind "all" is the mean over all layers. The measures of each layer are a line of
    `spectra.jsonl` in the trainer's default folder, and an entry of `history`.

    Args:
        layers: regular expression that matches whole paths of layers. None means all layers.
        intruders: count intruder dimensions too, which decomposes every frozen weight.
        file: name of the file. None writes no file.
    """

    def __init__(
        self, layers: str | None = None, intruders: bool = False, file: str | None = "spectra.jsonl"
    ) -> None:
        self.layers, self.intruders, self.file = layers, intruders, file
        self.history: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        # Every process computes the spectra, because a sharded weight needs all of them.
        measures = spectra(pl_module, self.layers, self.intruders)
        if not measures or not first():
            return
        record = {"step": trainer.global_step, "layers": measures}
        self.history.append(record)
        self._log(trainer, measures)
        if self.file is not None:
            self._append(Path(trainer.default_root_dir), self.file, record)

    def _log(self, trainer: Trainer, measures: dict[str, dict[str, Any]]) -> None:
        metrics = {}
        kind_of_path = {path: kind_of(path) for path in measures}
        for kind, means in mean_by_kind(measures, kind_of_path).items():
            for name, _, _ in COLUMNS:
                if not math.isnan(means[name]):
                    metrics[f"spectral/{kind}/{name}"] = means[name]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _append(self, folder: Path, name: str, record: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        append_text(folder / name, json.dumps(record) + "\n")


@torch.no_grad()
def spectra(
    model: nn.Module, layers: str | None = None, intruders: bool = True
) -> dict[str, dict[str, Any]]:
    """Return path -> measures, of every adapted layer that is a matrix and has a dense change.

    Args:
        model: with adapters.
        layers: regular expression that matches whole paths of layers. None means all layers.
        intruders: see `diagnose`.
    """
    measures = {}
    for path, layer in wrapped_layers(model).items():
        chosen = layers is None or re.fullmatch(layers, path)
        if chosen and _has_dense_change(layer):
            weight = kinds.dense(layer.innermost, layer.adapter_dtype)
            measures[path] = diagnose(change_of(layer), weight, intruders)
    return measures


def _has_dense_change(layer: Parameterization) -> bool:
    is_matrix = isinstance(layer.innermost, kinds.MATRICES)
    return is_matrix and all(wrapper.mergeable for wrapper in layer.nest if wrapper.enabled)


def kind_of(path: str) -> str:
    """Return the last component of a path that is no number: "q_proj" of "layers.0.q_proj"."""
    names = [part for part in path.split(".") if not part.isdigit()]
    return names[-1] if names else path
