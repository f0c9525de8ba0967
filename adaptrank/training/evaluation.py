"""Evaluate a model in the midst of its training, without a trace in it or in its log."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore modes and random number generators afterwards."""
    modes = {module: module.training for module in model.modules()}
    cuda = next((p.device for p in model.parameters() if p.is_cuda), None)
    with torch.random.fork_rng(devices=[] if cuda is None else [cuda]):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def training_loss(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
    """Return the loss of `training_step` in the present mode, without a trace in the log."""
    logs = ("log", "log_dict")
    for name in logs:
        module.__dict__[name] = _log_nothing
    try:
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(batch, 0)
    finally:
        for name in logs:
            del module.__dict__[name]
    return cast(Tensor, output["loss"] if isinstance(output, Mapping) else output)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a module's `log` while a loss is only evaluated."""
