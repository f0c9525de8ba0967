"""What a run would take, told from shapes alone: parameters, memory, and the size of its file."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptrank.artifacts.adapter import trained_modules
from adaptrank.axes import cost_model, rank_axes
from adaptrank.parameterizations import wrapped_layers, wrappers


@dataclass(frozen=True)
class Footprint:
    """Bytes, and numbers that train.

    Args:
        trainable: numbers.
        parameters: bytes of what trains.
        gradients: the same again.
        optimizer: bytes of its state.
        frozen: bytes of the base.
        file: bytes of the tensors that an adapter's file holds.
    """

    trainable: int
    parameters: int
    gradients: int
    optimizer: int
    frozen: int
    file: int


def footprint(model: nn.Module, states: float) -> Footprint:
    """Of an adapted model, which may be on the meta device.

    Args:
        model: with adapters.
        states: numbers that the optimizer keeps for each that trains.
    """
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())
    size = sum(p.numel() * p.element_size() for p in trained.values())
    saved: dict[int, torch.Tensor] = {id(t): t for t in trained_modules(model).values()}
    for wrapper in wrappers(model):
        saved |= {
            id(t): t
            for name, t in wrapper.state_dict(keep_vars=True).items()
            if not name.startswith("base.")
        }
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return Footprint(
        trainable=count,
        parameters=size,
        gradients=size,
        optimizer=round(states * size),
        frozen=sum(p.numel() * p.element_size() for p in frozen.values()),
        file=sum(t.numel() * t.element_size() for t in saved.values()),
    )


def states_of(optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer]) -> float:
    """Numbers that an optimizer keeps for each that it trains: one step of it on a small tensor tells."""
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.ones(4, 4)
    made = optimizer([{"params": [parameter]}])
    made.step()
    kept = (v for v in made.state[parameter].values() if isinstance(v, torch.Tensor))
    return sum(v.numel() for v in kept if v.numel() > 1) / parameter.numel()


def by_layer(model: nn.Module) -> dict[str, int]:
    """Numbers that train in each adapted layer; a tied one counts where it is first met."""
    found: dict[str, int] = defaultdict(int)
    seen: set[int] = set()
    for path, layer in wrapped_layers(model).items():
        for wrapper in layer.nest:
            for _, p in wrapper.own_parameters():
                if p.requires_grad and id(p) not in seen:
                    seen.add(id(p))
                    found[path] += p.numel()
    return dict(found)


def at_the_end(model: nn.Module, unit: str, budget: int) -> int:
    """Numbers that train in adapters at this budget; in ranks about, as if every axis shrank in proportion."""
    if unit == "parameters":
        return budget
    cost, sizes = cost_model(model), {key: len(axis) for key, axis in rank_axes(model).items()}
    total = sum(sizes.values())
    scaled: Mapping[str, float] = {key: size * budget / total for key, size in sizes.items()}
    return round(cost.total(scaled))
