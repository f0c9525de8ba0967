"""Parameters, memory and file size of a run, computed from shapes alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptrank.artifacts.base_weights import trained_modules
from adaptrank.artifacts.contents import adapter_tensors
from adaptrank.axes import cost_model, rank_axes


@dataclass(frozen=True)
class Footprint:
    """Number of trainable parameters, and bytes in memory and on disk.

    Args:
        trainable: number of trainable parameters.
        parameters: bytes of trainable parameters.
        gradients: bytes of their gradients.
        optimizer: bytes of the optimizer's state.
        frozen: bytes of the base.
        file: bytes of the tensors in an adapter's file.
    """

    trainable: int
    parameters: int
    gradients: int
    optimizer: int
    frozen: int
    file: int


def footprint(model: nn.Module, states: float) -> Footprint:
    """Return the footprint of an adapted model, which may be on the meta device.

    Args:
        model: with adapters.
        states: numbers that the optimizer keeps for each trainable parameter (see `states_of`).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    saved = [entry.tensor for entry in adapter_tensors(model, None)]
    saved += trained_modules(model).values()
    size = _bytes_of(trainable)
    return Footprint(
        trainable=sum(parameter.numel() for parameter in trainable),
        parameters=size,
        gradients=size,
        optimizer=round(states * size),
        frozen=_bytes_of(frozen),
        file=_bytes_of(saved),
    )


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors. A tied tensor counts once."""
    unique = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def states_of(
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer], model: nn.Module
) -> float:
    """Return the numbers that an optimizer keeps for each trainable parameter.

    They are counted after one step on a small tensor, or told by an optimizer that knows them
    (`state_numbers`). State tensors of one number do not count.

    Args:
        optimizer: parameter groups -> optimizer.
        model: the adapted model.
    """
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.ones(4, 4)
    probe = optimizer([{"params": [parameter]}])
    count: Callable[[nn.Module], int] | None = getattr(probe, "state_numbers", None)
    if count is not None:
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return count(model) / max(1, numbers)
    probe.step()
    sizes = [v.numel() for v in probe.state[parameter].values() if isinstance(v, torch.Tensor)]
    return sum(size for size in sizes if size > 1) / parameter.numel()


def at_the_end(model: nn.Module, unit: str, budget: int) -> int:
    """Return the number of trainable adapter parameters at a budget.

    For a budget in ranks it is an estimate: every axis shrinks in proportion.

    Args:
        model: with adapters.
        unit: "parameters" or "ranks".
        budget: total in that unit.
    """
    if unit == "parameters":
        return budget
    sizes = {key: len(axis) for key, axis in rank_axes(model).items()}
    total = sum(sizes.values())
    # Axes without any unit have no proportion, and grow alike.
    if not total:
        sizes, total = dict.fromkeys(sizes, 1), len(sizes)
    scaled: Mapping[str, float] = {key: size * budget / total for key, size in sizes.items()}
    return round(cost_model(model).total(scaled))
