"""A callback that logs the spectra of the changes while they are trained."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from adaptrank import layers as kinds
from adaptrank._collectives import first
from adaptrank.composition.changes import change_of
from adaptrank.composition.spectral import COLUMNS, diagnose, summed_up
from adaptrank.parameterizations import wrapped_layers


class SpectralMonitor(Callback):
    """Logs size, effective, stable and other ranks of W' - W, as means over each kind of layer, whenever validation ends.

    Names in the log are `spectral/<kind>/<measure>`; "all" is the mean over all layers. What is found layer by layer is a line of
    `spectra.jsonl` in the trainer's default folder, and in `history`.

    Args:
        layers: regular expression that paths of layers match in full; None is all of them.
        intruders: count intruder dimensions too, which decomposes every frozen weight.
        file: None for no file.
    """

    def __init__(
        self, layers: str | None = None, intruders: bool = False, file: str | None = "spectra.jsonl"
    ) -> None:
        self.layers, self.intruders, self.file = layers, intruders, file
        self.history: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        found = spectra(
            pl_module, self.layers, self.intruders
        )  # on every process: a sharded weight takes all of them
        if not found or not first():
            return
        summary = summed_up(found, {path: kind_of(path) for path in found})
        record = {"step": trainer.global_step, "layers": found}
        self.history.append(record)
        metrics = {
            f"spectral/{kind}/{name}": means[name]
            for kind, means in summary.items()
            for name, _, _ in COLUMNS
            if means[name] == means[name]
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.file is not None:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / self.file).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")


@torch.no_grad()
def spectra(
    model: nn.Module, layers: str | None = None, intruders: bool = True
) -> dict[str, dict[str, Any]]:
    """Layer -> its diagnostics, of every layer that is a matrix and has a change as one."""
    found = {}
    for path, layer in wrapped_layers(model).items():
        if layers is not None and not re.fullmatch(layers, path):
            continue
        if isinstance(layer.innermost, kinds.MATRICES) and all(
            w.mergeable for w in layer.nest if w.enabled
        ):
            found[path] = diagnose(
                change_of(layer), kinds.dense(layer.innermost, layer.adapter_dtype), intruders
            )
    return found


def kind_of(path: str) -> str:
    """Last name of a path that is no number: q_proj."""
    names = [part for part in path.split(".") if not part.isdigit()]
    return names[-1] if names else path
