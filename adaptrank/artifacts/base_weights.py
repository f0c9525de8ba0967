"""Tensors outside of the wrappers: the frozen base, and modules that train whole."""

from collections.abc import Callable, Collection, Iterator
from functools import partial

from torch import Tensor, nn

from adaptrank import layers as kinds
from adaptrank.parameterizations import (
    Parameterization,
    adapter_parameters,
    named_layers,
    plain_name,
)

Weight = Tensor | Callable[[], Tensor]
"""A tensor, or a function that puts it together."""


def frozen_weights(model: nn.Module, trained: Collection[str] | None = None) -> dict[str, Weight]:
    """Return the base's frozen parameters by their names before wrapping and splitting.

    The fingerprint of the base is computed from them.

    Args:
        model: any module, with wrappers or without.
        trained: names of parameters to leave out. The default leaves out those that train.
    """
    weights: dict[str, Weight] = {}
    for name, value, trains in _base_weights(model):
        left_out = trains if trained is None else name in trained
        if not left_out:
            weights[name] = value
    return weights


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Weight, bool]]:
    """Yield name, value and whether it trains, of every parameter outside of the wrappers."""
    adapter_ids = {id(parameter) for parameter in adapter_parameters(model)}
    parts: set[nn.Module] = set()
    for path, module in named_layers(model).items():
        plain = module.innermost if isinstance(module, Parameterization) else module
        if isinstance(plain, kinds.Parts):
            # The parts are listed as the fused layer that they were.
            parts |= set(plain.plain)
            yield from _fused_weights(path, plain)
        elif plain not in parts:
            for name, parameter in plain.named_parameters(recurse=False):
                if id(parameter) not in adapter_ids:
                    yield _join(path, name), parameter, parameter.requires_grad


def _fused_weights(path: str, split: kinds.Parts) -> Iterator[tuple[str, Weight, bool]]:
    """Yield the weight and the bias of a fused layer that was split."""
    trains = any(p.requires_grad for part in split.plain for p in part.parameters())
    for name in ("weight", "bias"):
        if any(getattr(part, name) is not None for part in split.plain):
            yield _join(path, name), partial(split.fused, name), trains


def trained_modules(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that train outside of any wrapper, and their modules' buffers, by name.

    A new classifier is an example.
    """
    adapter_ids = {id(parameter) for parameter in adapter_parameters(model)}
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        trained = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in adapter_ids
        }
        if not trained:
            continue
        path = plain_name(model, path)
        for name, parameter in trained.items():
            tensors[_join(path, name)] = parameter
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[_join(path, name)] = buffer
    return tensors


def _join(path: str, name: str) -> str:
    """Return the full name of a module's tensor. The path of the model itself is empty."""
    return f"{path}.{name}" if path else name
