"""The record of a run in its checkpoint, under one key, in plain values.

    checkpoint["adaptrank"] = {
        "format": 1,
        "adapter": the description that an adapter's file has: base, nests, layers, ranks, ...,
        "module": class of the LightningModule,
        "allocators": [{"class", "init_args"}],
        "training": {"optimizers", "trainer", "module", "data"},
    }

"training" is absent where weights alone are saved.

Everything that changes what a run computes is in it. Output folders, loggers, devices and workers
are not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from adaptrank.artifacts import describe_adapter, frozen_weights
from adaptrank.backbones import fingerprint
from adaptrank.checkpoints.plain_values import plain
from adaptrank.parameterizations import adapted_part

RECORD = "adaptrank"
"""Key of the record in a checkpoint."""
FORMAT = 1
"""Version of the record. A reader accepts records of its own version and of earlier ones."""

UNRECORDED = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Keys of an optimizer's group that do not change what it computes."""
TRAINER = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
)
"""Attributes of a Trainer that change what a run computes."""


def make_record(
    trainer: Trainer | None,
    module: LightningModule,
    base_fingerprint: str | None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the record of a run.

    Args:
        trainer: the Trainer, or None outside of one.
        module: holds the wrappers.
        base_fingerprint: fingerprint of the frozen model; it is computed if it is None.
        training: settings of training, as `training_settings` returned them at the start.
    """
    part = adapted_part(module)
    describe_base = getattr(module, "describe_base", dict)
    record = {
        "format": FORMAT,
        "adapter": plain(
            describe_adapter(part, describe_base(), base_fingerprint=base_fingerprint)
        ),
        "module": type(module).__name__,
        "allocators": [
            {"class": entry["class"], "init_args": entry["init_args"]}
            for entry in ([] if trainer is None else describe_allocators(trainer))
        ],
    }
    if training is not None:
        record["training"] = dict(training)
    return record


def base_fingerprint_of(module: LightningModule) -> str:
    """Return the fingerprint of the frozen model, which a module may know already."""
    known: str | None = getattr(module, "base_fingerprint", None)
    return identify_base(adapted_part(module)) if known is None else known


def identify_base(model: nn.Module) -> str:
    """Return the fingerprint of the frozen weights, or "" where they are not at hand.

    They are not where they are sharded, or on the meta device.
    """
    absent = any(p.is_meta or hasattr(p, "device_mesh") for p in model.parameters())
    return "" if absent else fingerprint(frozen_weights(model))


def describe_allocators(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the description of each allocator and rank initializer, by `describe_allocator`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    described = []
    for callback in callbacks:
        describe: Callable[[], dict[str, Any]] | None = getattr(
            callback, "describe_allocator", None
        )
        if describe is not None:
            described.append(describe())
    return described


def training_settings(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return the settings of a run that change what it computes, beside nests and allocators."""
    settings: dict[str, Any] = {
        "optimizers": [_describe_optimizer(optimizer) for optimizer in trainer.optimizers],
        "trainer": {name: plain(getattr(trainer, name, None)) for name in TRAINER},
    }
    for name, owner in (("module", module), ("data", getattr(trainer, "datamodule", None))):
        describe: Callable[[], dict[str, Any]] | None = getattr(owner, "describe_training", None)
        if describe is not None:
            settings[name] = plain(describe())
    return settings


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "class": type(optimizer).__name__,
        "groups": [_describe_group(group) for group in optimizer.param_groups],
    }


def _describe_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a group. A scheduler moves `lr`, and keeps its start."""
    described = {name: plain(value) for name, value in group.items() if name not in UNRECORDED}
    described["lr"] = described.pop("initial_lr", described.get("lr"))
    return described
