"""Settings as plain values, which a checkpoint holds without pickled objects."""

import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

MOST_VALUES = 64
"""Values of a tensor that are recorded. A longer tensor is recorded by its shape and its sum."""


def plain(value: Any) -> Any:
    """Return a value in numbers, text, lists and mappings. An object becomes its description."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Tensor):
        return _plain_tensor(value)
    if isinstance(value, Mapping):
        return {_key(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(str(plain(entry)) for entry in value)
    return _describe(value)


def _key(key: Any) -> str | int:
    return key if type(key) in (str, int) else str(plain(key))


def _plain_tensor(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    if tensor.numel() <= MOST_VALUES:
        return tensor.tolist()
    return f"tensor of shape {tuple(tensor.shape)}, sum {float(tensor.double().sum())!r}"


def _describe(value: Any) -> str:
    """Describe an object by its name, or by its text without addresses."""
    if isinstance(value, partial):
        arguments = [plain(value.args), plain(value.keywords)]
        return f"{_describe(value.func)} with {arguments}"
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return f"{getattr(value, '__module__', '')}.{name}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def constructor_arguments(cls: type, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a constructor by name, with defaults, as plain values.

    Arguments that do not fit return {}, since the constructor itself will say so.
    """
    try:
        bound = _signature(cls).bind(None, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    named = dict(list(bound.arguments.items())[1:])
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return {name: plain(value) for name, value in named.items()}


def constructor_defaults(cls: type) -> dict[str, Any]:
    """Return the arguments of a constructor that have a default, as plain values."""
    parameters = _signature(cls).parameters.values()
    return {p.name: plain(p.default) for p in parameters if p.default is not p.empty}


def _signature(cls: type) -> inspect.Signature:
    """Return the signature of a constructor with `self`, whatever `__new__` accepts."""
    return inspect.signature(cls.__init__)  # type: ignore[misc]
