"""The best checkpoint of a run, by the metric that a ModelCheckpoint monitors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from adaptrank._collectives import from_all, from_first
from adaptrank.artifacts.checkpoint_reading import read_checkpoint
from adaptrank.axes import fit_ranks
from adaptrank.parameterizations import wrappers

Inherited = dict[str, tuple[str, float]]
"""monitored metric -> (best checkpoint, its value), from a checkpoint that a run resumed from."""


@dataclass(frozen=True)
class Best:
    """A checkpoint that a ModelCheckpoint holds to be the best one.

    Args:
        file: the checkpoint.
        monitor: the metric.
        mode: "min" or "max".
        value: the metric at the checkpoint.
    """

    file: Path
    monitor: str
    mode: str
    value: float


def ranking_callback(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the first ModelCheckpoint of a trainer that monitors a metric."""
    for callback in _callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback
    return None


def moves_left(trainer: Trainer) -> bool:
    """Return whether an allocator of the run may still move ranks."""
    return any(getattr(callback, "moves_left", False) for callback in _callbacks(trainer))


def restart_ranking(trainer: Trainer) -> None:
    """Let each ModelCheckpoint with a metric rank anew, from this step on.

    A checkpoint from before the allocator's last event has other ranks than the budget asks for. It
    would keep worse checkpoints that meet the budget from being saved. Its file stays.
    """
    for callback in _callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path = ""
            callback.best_model_path = ""
            callback.best_model_score = None


def inherited_ranking(checkpoint: Mapping[str, Any]) -> Inherited:
    """Return the best checkpoints that are known to a checkpoint."""
    found: Inherited = {}
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("monitor"):
            path, score = state.get("best_model_path"), state.get("best_model_score")
            if path and score is not None:
                found[state["monitor"]] = (str(path), float(score))
    return found


def best_checkpoint(trainer: Trainer, inherited: Inherited) -> Best | None:
    """Return the best checkpoint of a run, or None if no step could be ranked.

    Steps before the allocator's last event do not count.

    Args:
        trainer: the trainer of the run, which is over.
        inherited: best checkpoints of the run that this one resumed.
    """
    callback = ranking_callback(trainer)
    if callback is None or moves_left(trainer):
        return None
    candidates = []
    if callback.best_model_path and callback.best_model_score is not None:
        candidates.append((float(callback.best_model_score), str(callback.best_model_path)))
    assert callback.monitor is not None
    if callback.monitor in inherited:
        path, score = inherited[callback.monitor]
        candidates.append((score, path))
    ranked = [(score, path) for score, path in candidates if _is_there(score, path)]
    chosen = None
    if ranked:
        score, path = (min if callback.mode == "min" else max)(ranked, key=lambda pair: pair[0])
        chosen = Best(Path(path), callback.monitor, callback.mode, score)
    # Only the first process is sure to see the files.
    return from_first(chosen)


def _is_there(score: float, path: str) -> bool:
    return math.isfinite(score) and Path(path).is_file()


def load_best(module: LightningModule, best: Best) -> int:
    """Load the weights of a checkpoint into the module of its run, and return their step.

    Raises:
        UserError: if it cannot be read without running code in it. The module is unchanged then.
    """
    everywhere = all(from_all(best.file.is_file()))
    checkpoint: dict[str, Any] = {}
    if everywhere:
        checkpoint = _weights_of(best.file)
    else:
        checkpoint = from_first(_weights_of(best.file) if best.file.is_file() else {})
    state_dict = checkpoint["state_dict"]
    fit_ranks(module, state_dict)
    module.load_state_dict(state_dict, strict=module.strict_loading)
    for wrapper in wrappers(module):
        wrapper.renew()
    return int(checkpoint["global_step"])


def _weights_of(file: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(file)
    return {key: checkpoint[key] for key in ("state_dict", "global_step")}


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
