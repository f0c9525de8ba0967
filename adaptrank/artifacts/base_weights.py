"""Tensors outside of the wrappers: the frozen base, and modules that train whole."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptrank import layers as kinds
from adaptrank.injection import plain_tensor_name, trained_ids
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
        trained: names of parameters to leave out. The default leaves out `trained_modules`.
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
    trained = trained_ids(model)
    parts: set[nn.Module] = set()
    for path, module in named_layers(model).items():
        plain = module.innermost if isinstance(module, Parameterization) else module
        if isinstance(plain, kinds.Parts):
            # The parts are listed as the fused layer that they were.
            parts |= set(plain.plain)
            yield from _fused_weights(path, plain, trained)
        elif plain not in parts:
            for name, parameter in plain.named_parameters(recurse=False):
                if id(parameter) not in adapter_ids:
                    full_name = _plain_name(plain, path, name)
                    yield full_name, parameter, id(parameter) in trained


def _plain_name(module: nn.Module, path: str, name: str) -> str:
    """Return the name of a parameter before rows of its layer train by themselves."""
    plain = plain_tensor_name(module, name)
    if plain is None:
        return _join(path, name)
    # <layer>.parametrizations.weight.original
    return _join(path.rpartition(".parametrizations.")[0], plain)


def _fused_weights(
    path: str, split: kinds.Parts, trained: Collection[int]
) -> Iterator[tuple[str, Weight, bool]]:
    """Yield the weight and the bias of a fused layer that was split."""
    trains = any(id(p) in trained for part in split.plain for p in part.parameters())
    for name in ("weight", "bias"):
        if any(getattr(part, name) is not None for part in split.plain):
            yield _join(path, name), partial(split.fused, name), trains


def weights_beside_linear_layers(
    model: nn.Module, trained: Collection[str] | None = None
) -> dict[str, Weight]:
    """Return the frozen parameters that are no weight of a linear layer, by their names.

    A quantization leaves them as they are, so that a base and its quantized form have the same.

    Args:
        model: any module, with wrappers or without.
        trained: as in `frozen_weights`.
    """
    linear = set()
    for path, module in named_layers(model).items():
        plain = module.innermost if isinstance(module, Parameterization) else module
        if isinstance(plain, (*kinds.LINEAR, kinds.Parts)):
            linear.add(_join(path, "weight"))
    weights = frozen_weights(model, trained)
    return {name: value for name, value in weights.items() if name not in linear}


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """Return how the layers of a model are quantized, as `layers.quantization` does, or None.

    Where layers differ, the first one counts.
    """
    for module in model.modules():
        if not isinstance(module, Parameterization):
            described = kinds.quantization(module)
            if described is not None:
                return described
    return None


def trained_modules(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that train outside of any wrapper, and their modules' buffers, by name.

    A new classifier is an example. A module that `adapt` or a file put to train is listed also if
    it was frozen since.
    """
    trained_whole = trained_ids(model)
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        trained = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in trained_whole
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
