"""Copy the tensors of an adapter's file into a model that carries the same wrappers."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.artifacts.contents import StoredTensor, adapter_tensors
from adaptrank.axes import fit_ranks
from adaptrank.parameterizations import plain_name, wrappers


def load_tensors(
    model: nn.Module, file: Path, tied: Mapping[str, str], names: Collection[str]
) -> None:
    """Give every axis of these adapters its stored size, and every tensor its stored value.

    Args:
        model: with the wrappers of the file.
        file: safetensors file of an adapter.
        tied: {key: key of the same tensor in the file}.
        names: names of the adapters.
    Raises:
        ValueError: for a tensor that is missing, unexpected, or of another shape or kind.
    """
    adapters = adapter_tensors(model, names)
    parameters = _by_plain_name(model, model.named_parameters(remove_duplicate=False))
    other_tensors = parameters | _by_plain_name(model, model.named_buffers())
    with safe_open(file, framework="pt") as stored:
        keys = set(stored.keys())
        adapter_keys = dict.fromkeys(entry.key for entry in adapters)
        # What is stored beside the adapters: tensors of modules that were trained whole.
        whole_keys = sorted((keys | tied.keys()) - adapter_keys.keys())
        _check_keys(file, keys, tied, adapter_keys, whole_keys, other_tensors)
        all_keys = [*adapter_keys, *whole_keys]
        values = {key: stored.get_tensor(tied.get(key, key)) for key in all_keys}

    _tie_as_stored(adapters, tied)
    fit_ranks(model, _as_state_dict(model, adapters, values))
    tensors = {entry.key: entry.tensor for entry in adapters}
    tensors |= {key: other_tensors[key] for key in whole_keys}
    for key, value in values.items():
        _check_value(file, key, value, tensors[key])
    with torch.no_grad():
        for key, value in values.items():
            tensors[key].copy_(value)
    for key in whole_keys:
        trains = key in parameters and other_tensors[key].is_floating_point()
        other_tensors[key].requires_grad_(trains)
    for wrapper in wrappers(model):
        wrapper.refresh()


def _by_plain_name(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors by their names in files, without those of modules that enclose others."""
    return {plain_name(model, name): tensor for name, tensor in named}


def _check_keys(
    file: Path,
    keys: Collection[str],
    tied: Mapping[str, str],
    adapter_keys: Collection[str],
    whole_keys: Collection[str],
    other_tensors: Mapping[str, Tensor],
) -> None:
    """Refuse a file with a key that the model does not have, or without one that it needs."""
    unexpected = [key for key in whole_keys if key not in other_tensors]
    missing = sorted(key for key in adapter_keys if key not in keys and tied.get(key) not in keys)
    for problem, wrong_keys in (("an unexpected tensor", unexpected), ("no tensor", missing)):
        if wrong_keys:
            raise UserError(
                f"{file} does not fit this model: it has {problem} {wrong_keys[0]} "
                f"({len(wrong_keys)} such)."
            )


def _as_state_dict(
    model: nn.Module, adapters: Iterable[StoredTensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the stored values under the keys of the model's state dict."""
    paths = {module: path for path, module in model.named_modules()}
    state_dict = {}
    for entry in adapters:
        path = paths[entry.wrapper]
        state_dict[f"{path}.{entry.name}" if path else entry.name] = values[entry.key]
    return state_dict


def _check_value(file: Path, key: str, value: Tensor, present: Tensor) -> None:
    if value.shape != present.shape:
        raise UserError(
            f"{file}: {key} is {tuple(value.shape)}, this model's is {tuple(present.shape)}."
        )
    if value.is_floating_point() != present.is_floating_point():
        raise UserError(f"{file}: {key} is {value.dtype}, this model's is {present.dtype}.")


def _tie_as_stored(adapters: Iterable[StoredTensor], tied: Mapping[str, str]) -> None:
    """Tie the tensors that were tied when the adapter was saved, and untie all others.

    `adapt` ties the layers of one call, and the saved adapter may come from several calls.
    """
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for entry in adapters:
        tensor = entry.tensor
        if entry.key in tied:
            tensor = tensors[tied[entry.key]]
        elif id(tensor) in taken:
            copied = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, tensor.requires_grad)
            tensor = copied
        if tensor is not entry.tensor:
            entry.replace(tensor)
        tensors[entry.key] = tensor
        taken.add(id(tensor))
