"""The regularizers of methods (orthogonality): their gradient, added once a step, with no user's loss rewritten."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from adaptrank.parameterizations.base import wrappers


class Regularize(Callback):
    """Adds the gradient of every method's `penalty` before each optimizer step.

    Allocators and the modules of this library do it by themselves; a LightningModule of your own that trains such a
    method without an allocator takes this callback.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        add_penalty_gradients(trainer, pl_module)


def add_penalty_gradients(trainer: Trainer, pl_module: LightningModule) -> None:
    """Add the gradient of the mean penalty to `.grad` and log it as "penalty"; a second call in one step does nothing."""
    # The trainer remembers, not the module: a module that is fitted again starts at step 0 again.
    if getattr(trainer, "_penalized_at", None) == trainer.global_step:
        return
    trainer._penalized_at = trainer.global_step  # type: ignore[attr-defined]
    value = penalty_gradients(pl_module)
    if value is not None:
        pl_module.log("penalty", value)


def penalty_gradients(model: nn.Module) -> torch.Tensor | None:
    """Add the gradient of the mean penalty over the wrappers that have one; returns its value, or None without any."""
    with torch.enable_grad():
        enabled = [wrapper for wrapper in wrappers(model) if wrapper.enabled]
        penalties = [p for w in enabled if (p := w.penalty()) is not None and p.requires_grad]
        if not penalties:
            return None
        total = torch.stack(penalties).mean()
    own = (p for w in enabled for _, p in w.own_parameters() if p.requires_grad)
    parameters = list({id(p): p for p in own}.values())  # a tied tensor once
    # Not backward(): under data parallel that would wake the reducer a second time.
    for parameter, grad in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    return total.detach()
