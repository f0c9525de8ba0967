"""Penalties: regularizers that methods bring along, such as the orthogonality of the SVD form.

The gradient of the mean penalty is added once an optimizer step. No user's loss is rewritten.
"""

from collections.abc import Container, Hashable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from adaptrank.parameterizations import Parameterization, wrappers

Gradients = list[tuple[nn.Parameter, Tensor]]
"""(parameter, gradient) pairs; a tied parameter may occur several times."""


def add_penalty_gradients(model: nn.Module, moved: Container[int] | None = None) -> Tensor | None:
    """Add the gradient of the mean penalty over the wrappers that have one.

    Args:
        model: any module that holds wrappers.
        moved: ids of the parameters that get a gradient. None means all.
    Returns:
        The mean penalty, or None if no wrapper has one, or if none of its parameters is moved.
    """
    values: list[Tensor] = []
    gradients: Gradients = []
    for group in _groups(model):
        batched = _batched(group)
        group_values, group_gradients = _one_by_one(group) if batched is None else batched
        values += group_values
        gradients += group_gradients
    if moved is not None:
        gradients = [(parameter, grad) for parameter, grad in gradients if id(parameter) in moved]
    if not gradients:
        return None
    # An idle wrapper has a penalty of 0. It counts in the mean as it did with units, so that the
    # weight of the others does not depend on it.
    count = len(values) + sum(wrapper.idle and _counts(wrapper) for wrapper in _penalized(model))
    # Not backward(): under data parallel that would wake the reducer a second time.
    weighted = torch._foreach_div([grad for _, grad in gradients], count)
    for (parameter, _), grad in zip(gradients, weighted, strict=True):
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    return torch.stack(values).sum() / count


def _penalized(model: nn.Module) -> list[Parameterization]:
    """Return the enabled wrappers whose method has a penalty."""
    return [
        wrapper
        for wrapper in wrappers(model)
        if wrapper.enabled and type(wrapper).penalty is not Parameterization.penalty
    ]


def _counts(wrapper: Parameterization) -> bool:
    """Return whether a wrapper has a penalty that would move any of its parameters."""
    trains = any(parameter.requires_grad for _, parameter in wrapper.own_parameters())
    return trains and wrapper.penalty() is not None


def _groups(model: nn.Module) -> list[list[Parameterization]]:
    """Return the wrappers with a penalty, grouped by those that can be computed together."""
    groups: dict[Hashable, list[Parameterization]] = {}
    for wrapper in _penalized(model):
        if not wrapper.idle:
            groups.setdefault(_group_key(wrapper), []).append(wrapper)
    return list(groups.values())


SWITCHES = frozenset({"name", "training", "enabled", "idle", "rows", "gates"})
"""Attributes that no penalty reads. Some wrappers have them only after they were set once, and the
order of a sum must not depend on that: a resumed run would differ in the last bit."""


def _group_key(wrapper: Parameterization) -> Hashable:
    """Return a key that is equal for wrappers whose penalties are one function of like tensors.

    The key is unique to the wrapper where that cannot be told from its attributes.
    """
    settings = {
        name: value
        for name, value in vars(wrapper).items()
        if not name.startswith("_") and name not in SWITCHES
    }
    if not _is_told_by(wrapper, settings):
        return id(wrapper)
    tensors = [
        (name, p.shape, p.dtype, p.device, p.requires_grad) for name, p in wrapper.own_parameters()
    ]
    return (type(wrapper), repr(settings), *tensors)


def _is_told_by(wrapper: Parameterization, settings: Mapping[str, object]) -> bool:
    """Return whether settings and trained tensors are all that a penalty can depend on."""
    if wrapper.gates or isinstance(wrapper.base, Parameterization):
        return False
    if any(buffer is not None for buffer in wrapper._buffers.values()):
        return False
    for name, module in wrapper._modules.items():
        if name != "base" and not isinstance(module, nn.Dropout):
            return False
    return all(
        isinstance(value, int | float | str | tuple | list | dict | None)
        for value in settings.values()
    )


class _Penalty(nn.Module):
    """The penalty of a wrapper as a forward pass, for `torch.func.functional_call`."""

    def __init__(self, wrapper: Parameterization) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self) -> Tensor:
        return cast(Tensor, self.wrapper.penalty())


def _batched(group: Sequence[Parameterization]) -> tuple[list[Tensor], Gradients] | None:
    """Return penalties and gradients of many wrappers from one batched computation.

    Returns None where there is nothing to gain, or where a penalty cannot be batched.
    """
    tensors = [dict(wrapper.own_parameters()) for wrapper in group]
    if len(group) == 1 or not all(p.requires_grad for p in tensors[0].values()):
        return None
    used = _tensors_of_penalty(group[0])
    if not used:
        return None
    module = _Penalty(group[0])

    def penalty(values: dict[str, Tensor]) -> Tensor:
        named = {f"wrapper.{name}": value for name, value in values.items()}
        return cast(Tensor, torch.func.functional_call(module, named, ()))

    stacked = {}
    for name in used:
        stacked[name] = torch.stack([named[name].detach() for named in tensors])
    try:
        grads, values = torch.func.vmap(torch.func.grad_and_value(penalty))(stacked)
    except RuntimeError:  # the penalty looks at values, or draws random numbers
        return None
    gradients: Gradients = []
    for name, stack in grads.items():
        parameters = [named[name] for named in tensors]
        gradients += zip(parameters, stack, strict=True)
    return list(values.unbind()), gradients


def _tensors_of_penalty(wrapper: Parameterization) -> list[str]:
    """Return the names of the tensors that the penalty of a wrapper depends on."""
    _, gradients = _one_by_one([wrapper])
    used = {id(parameter) for parameter, _ in gradients}
    return [name for name, parameter in wrapper.own_parameters() if id(parameter) in used]


def _one_by_one(group: Sequence[Parameterization]) -> tuple[list[Tensor], Gradients]:
    values: list[Tensor] = []
    gradients: Gradients = []
    for wrapper in group:
        trained = [p for _, p in wrapper.own_parameters() if p.requires_grad]
        with torch.enable_grad():
            value = wrapper.penalty()
            if value is None or not value.requires_grad:
                continue
            grads = torch.autograd.grad(value, trained, allow_unused=True)
        values.append(value.detach())
        for parameter, grad in zip(trained, grads, strict=True):
            if grad is not None:
                gradients.append((parameter, grad))
    return values, gradients
