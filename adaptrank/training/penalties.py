"""The regularizers of methods (orthogonality): their gradient, added once a step, with no user's loss rewritten."""

from collections.abc import Hashable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from adaptrank.parameterizations import Parameterization, wrappers


class Regularize(Callback):
    """Adds the gradient of every method's `penalty` before each optimizer step.

    Allocators and the modules of this library do it by themselves; a LightningModule of your own that trains such a
    method without an allocator takes this callback.
    """

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
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


def penalty_gradients(model: nn.Module) -> Tensor | None:
    """Add the gradient of the mean penalty over the wrappers that have one; returns its value, or None without any."""
    groups: dict[Hashable, list[Parameterization]] = {}
    for wrapper in wrappers(model):
        if wrapper.enabled and type(wrapper).penalty is not Parameterization.penalty:
            groups.setdefault(_alike(wrapper), []).append(wrapper)
    values: list[Tensor] = []
    found: list[tuple[nn.Parameter, Tensor]] = []
    for group in groups.values():
        value, grads = _together(group) or _one_by_one(group)
        values += value
        found += grads
    if not values:
        return None
    # Not backward(): under data parallel that would wake the reducer a second time.
    weighted = torch._foreach_div([grad for _, grad in found], len(values))
    for (parameter, _), grad in zip(found, weighted, strict=True):
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    return torch.stack(values).mean()


_Penalties = tuple[list[Tensor], list[tuple[nn.Parameter, Tensor]]]
"""(values, (parameter, gradient)), of some wrappers; a tied parameter several times."""


def _alike(wrapper: Parameterization) -> Hashable:
    """Equal for wrappers whose penalties are one function of tensors of the same shapes; unique where that cannot be told."""
    plain = {
        k: v
        for k, v in vars(wrapper).items()
        if not k.startswith("_") and k not in ("name", "training")
    }
    told = all(
        isinstance(v, int | float | str | tuple | list | dict | None) for v in plain.values()
    )
    more: list[object] = [b for b in wrapper._buffers.values() if b is not None]
    more += [
        m
        for name, m in wrapper._modules.items()
        if name != "base" and not isinstance(m, nn.Dropout)
    ]
    if more or wrapper.gates or isinstance(wrapper.base, Parameterization) or not told:
        return id(wrapper)
    own = [
        (name, p.shape, p.dtype, p.device, p.requires_grad) for name, p in wrapper.own_parameters()
    ]
    return (type(wrapper), repr(plain), *own)


def _together(group: list[Parameterization]) -> _Penalties | None:
    """One batched computation for many layers, or None where there is nothing to gain, or a penalty cannot be batched."""
    first, named = group[0], [dict(wrapper.own_parameters()) for wrapper in group]
    if len(group) == 1 or not all(p.requires_grad for p in named[0].values()):
        return None
    of_first = {id(p) for p, _ in _one_by_one([first])[1]}
    used = [name for name, p in named[0].items() if id(p) in of_first]
    if not used:
        return None

    def penalty(tensors: dict[str, Tensor]) -> Tensor:
        before = dict(first._parameters)
        try:
            first._parameters.update(tensors)  # type: ignore[arg-type]
            return cast(Tensor, first.penalty())
        finally:
            first._parameters.update(before)

    stacked = {name: torch.stack([own[name].detach() for own in named]) for name in used}
    try:
        grads, values = torch.func.vmap(torch.func.grad_and_value(penalty))(stacked)
    except RuntimeError:  # it looks at values, or draws
        return None
    return list(values.unbind()), [
        (own[n], g) for n in grads for own, g in zip(named, grads[n], strict=True)
    ]


def _one_by_one(group: list[Parameterization]) -> _Penalties:
    values, found = [], []
    for wrapper in group:
        own = [p for _, p in wrapper.own_parameters() if p.requires_grad]
        with torch.enable_grad():
            value = wrapper.penalty()
            if value is None or not value.requires_grad:
                continue
            grads = torch.autograd.grad(value, own, allow_unused=True)
        values.append(value.detach())
        found += [(p, g) for p, g in zip(own, grads, strict=True) if g is not None]
    return values, found
