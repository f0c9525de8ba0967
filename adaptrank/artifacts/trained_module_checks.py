"""Check values of modules that were trained whole against the model that is to get them.

A model has one of each such module. So a file must not change a module that another adapter of the
model uses, nor give two values to one tensor that the model ties.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.parameterizations import plain_name, wrappers


def check_other_adapters(
    model: nn.Module,
    names: Collection[str],
    values: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    source: Path,
) -> None:
    """Refuse values that would change a module which an adapter of another name uses.

    Args:
        model: the model that is to get the values.
        names: names of the adapters that the values come with.
        values: name of a tensor -> its value.
        present: name of a tensor -> the model's tensor.
        source: file or folder of the adapter, which the error names.
    """
    others = [wrapper.name for wrapper in wrappers(model) if wrapper.name not in names]
    if not others:
        return
    for key, value in values.items():
        if not _is_same(present[key], value):
            module = key.rpartition(".")[0] or key
            raise UserError(
                f"{source} was trained with its own {module}, and adapter {others[0]!r} of this "
                f"model uses another one; load each into a copy of the base, or call "
                f"adaptrank.merge(model) or adaptrank.delete_adapter(model, {others[0]!r}) first."
            )


def check_ties(
    model: nn.Module, values: Mapping[str, Tensor], present: Mapping[str, Tensor], source: Path
) -> None:
    """Refuse a file that trained a tensor apart from another one with which the model ties it.

    A file of a model with the same tie names the tensor under all its names.

    Args:
        model: the model that is to get the values.
        values: name of a tensor -> its value.
        present: name of a tensor -> the model's tensor.
        source: file of the adapter, which the error names.
    """
    names = _names_by_tensor(model)
    first_keys: dict[int, str] = {}
    for key, value in values.items():
        tensor = present[key]
        first = first_keys.setdefault(id(tensor), key)
        if not torch.equal(values[first].to(tensor.dtype), value.to(tensor.dtype)):
            raise untied(source, first, key, f"apart from {key}")
        for other in names.get(id(tensor), []):
            if other not in values and not _is_same(tensor, value):
                raise untied(source, key, other, f"and leaves {other} as it was")


def untied(source: Path, name: str, other: str, how: str) -> UserError:
    """Return the error for a tensor that was trained apart from one with which it is tied.

    Args:
        source: file or folder of the adapter.
        name: name of the trained tensor.
        other: the other name that the model has for it.
        how: how the other one was trained, such as "apart from lm_head.weight".
    """
    module, _, parameter = other.rpartition(".")
    return UserError(
        f"{source} trained {name} {how}, and this model ties the two. Untie them first: set "
        f"model.config.tie_word_embeddings to False, and model.{module}.{parameter} to "
        f"torch.nn.Parameter(model.{module}.{parameter}.detach().clone())."
    )


def _names_by_tensor(model: nn.Module) -> dict[int, list[str]]:
    """Return id of a parameter -> its names. A module at several places is listed once."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        path = plain_name(model, path)
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return names


def _is_same(present: Tensor, value: Tensor) -> bool:
    """Return whether a tensor has a value already. One on the meta device has none to lose."""
    return present.is_meta or torch.equal(present.detach(), value.to(present))
