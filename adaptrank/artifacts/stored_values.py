"""Copy the tensors of an adapter's file into a model that carries the same wrappers.

Every key, tie, shape, dtype and number is checked before the first tensor of the model changes.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError, some
from adaptrank.artifacts.contents import (
    StoredTensor,
    adapter_names,
    adapter_tensors,
    wrappers_named,
)
from adaptrank.artifacts.header import place_of
from adaptrank.artifacts.rollback import Rollback
from adaptrank.artifacts.trained_module_checks import check_other_adapters, check_ties
from adaptrank.artifacts.weights_file import DTYPES, StoredTensors
from adaptrank.axes import fit_ranks, natural, rank_axes
from adaptrank.injection import record_trained
from adaptrank.parameterizations import (
    Parameterization,
    check_indices,
    is_index,
    plain_name,
    wrapped_layers,
    wrappers,
)

Member = tuple[Parameterization, str]
"""A wrapper, and the name of one of its axes."""


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors outside of wrappers that a file may hold, by name.

    They are parameters and saved buffers of the base. A module that trains whole has some of them.
    """
    of_wrappers: set[int] = set()
    for wrapper in wrappers(model):
        of_wrappers.update(id(tensor) for tensor in wrapper.own_tensors().values())
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        unsaved = module._non_persistent_buffers_set
        path = plain_name(model, path)
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in of_wrappers and name not in unsaved:
                    tensors[f"{path}.{name}" if path else name] = tensor
    return tensors


def load_tensors(
    model: nn.Module,
    stored: StoredTensors,
    description: Mapping[str, Any],
    rollback: Rollback,
    together: bool,
) -> None:
    """Give every axis of a file's adapters its stored size, and every tensor its stored value.

    Args:
        model: with the wrappers of the file.
        stored: tensors of the file.
        description: of the file.
        rollback: gets to know every tensor of the model that changes.
        together: whether other adapters of the model may get other values of the modules that the
            file's adapters trained whole.
    Raises:
        ValueError: for a tensor that is missing, unexpected, or of another shape or kind, for
            numbers that the adapters cannot have, and for modules that the model cannot have twice.
            Nothing has changed then.
    """
    tied: Mapping[str, str] = description["tied"]
    adapters = adapter_tensors(model, adapter_names(description))
    base = whole_tensors(model)
    declared = set(description["trained_modules"])
    whole = {name: tensor for name, tensor in base.items() if name in declared}
    _check_keys(stored, description, {entry.key: entry for entry in adapters}, whole)
    keys = [*[entry.key for entry in adapters], *whole]
    values = {key: stored[tied.get(key, key)] for key in keys}
    _check_values(stored, adapters, whole, values)
    whole_values = {key: values[key] for key in whole}
    check_ties(model, whole_values, whole, stored.file)
    if not together:
        names = adapter_names(description)
        check_other_adapters(model, names, whole_values, whole, stored.file)

    present = [entry.tensor for entry in adapters if entry.wrapper in rollback]
    rollback.announce([*present, *whole.values()])
    _tie_as_stored(adapters, tied)
    fit_ranks(model, _as_state_dict(model, adapters, values))
    _check_ranks(model, stored, description)
    tensors = {entry.key: entry.tensor for entry in adapters} | whole
    with torch.no_grad():
        for key, value in values.items():
            tensors[key].copy_(value)
    for target in whole.values():
        target.requires_grad_(isinstance(target, nn.Parameter) and target.is_floating_point())
    record_trained(model, whole.values())
    for wrapper in wrappers(model):
        wrapper.renew()


# ---- what is checked


def _check_keys(
    stored: StoredTensors,
    description: Mapping[str, Any],
    adapters: Mapping[str, StoredTensor],
    whole: Mapping[str, Tensor],
) -> None:
    """Refuse a file with a key that the model does not have, or without one that it needs."""
    tied: Mapping[str, str] = description["tied"]
    declared = dict.fromkeys(description["trained_modules"])
    expected = adapters.keys() | declared.keys()
    unexpected = sorted((set(stored) | tied.keys()) - expected)
    unknown = [name for name in declared if name not in whole]
    missing = sorted(key for key in expected if key not in stored and tied.get(key) not in stored)
    for problem, wrong_keys in (
        ("an unexpected tensor", unexpected),
        ("no place in this model for", unknown),
        ("no tensor", missing),
    ):
        if wrong_keys:
            raise UserError(
                f"{stored.file} does not fit this model: it has {problem} {wrong_keys[0]} "
                f"({len(wrong_keys)} such)."
            )
    for key, owner in tied.items():
        _check_tie(stored, key, owner, adapters)


def _check_tie(
    stored: StoredTensors, key: str, owner: str, adapters: Mapping[str, StoredTensor]
) -> None:
    """Refuse a tie of two tensors that no method would tie."""
    one, other = adapters.get(key), adapters.get(owner)
    same_role = (one is None) == (other is None)
    if one is not None and other is not None:
        same_role = type(one.wrapper) is type(other.wrapper) and one.name == other.name
    if key in stored or owner not in stored or not same_role:
        raise UserError(f"{stored.file} is damaged: it ties {key} to {owner}, which is another.")


def _check_values(
    stored: StoredTensors,
    adapters: Iterable[StoredTensor],
    whole: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> None:
    """Refuse values that the tensors they are for cannot have."""
    for entry in adapters:
        _check_shape(stored, entry, values[entry.key])
        _check_adapter_value(stored, entry, values[entry.key])
    for key, target in whole.items():
        _check_whole_value(stored, key, values[key], target)


def _check_shape(stored: StoredTensors, entry: StoredTensor, value: Tensor) -> None:
    """Refuse a value of an adapter that has another size beside those of units and stacks."""
    present = entry.tensor
    free: set[int] = set()
    for stack in entry.wrapper.stacks.values():
        free.update(dim for name, dim in stack.items() if name == entry.name)
    for axis in entry.wrapper.axes:
        free.update(dim for name, dim in entry.wrapper.axis_tensors(axis) if name == entry.name)
    if value.dim() != present.dim() and free:
        # Sizes of axes and stacks are compared when ranks are fitted, which names them.
        return
    fixed = [dim for dim in range(present.dim()) if dim not in free]
    same = value.dim() == present.dim()
    if not same or any(value.shape[dim] != present.shape[dim] for dim in fixed):
        raise _shape_error(stored, entry.key, value, present)


def _check_adapter_value(stored: StoredTensors, entry: StoredTensor, value: Tensor) -> None:
    """Refuse a value of an adapter of another kind, or with numbers that it cannot have."""
    present, wrapper = entry.tensor, entry.wrapper
    if value.dtype not in DTYPES or is_index(value) != is_index(present):
        raise _dtype_error(stored, entry.key, value, present)
    if is_index(present):
        check_indices(wrapper, entry.name, value, f"{stored.file}: {entry.key}")
    else:
        _check_finite(stored, entry.key, value, present)


def _check_whole_value(stored: StoredTensors, key: str, value: Tensor, present: Tensor) -> None:
    """Refuse a value of a module that was trained whole which does not fit the module."""
    if value.shape != present.shape:
        raise _shape_error(stored, key, value, present)
    both_float = value.is_floating_point() and present.is_floating_point()
    if not both_float and value.dtype != present.dtype:
        raise _dtype_error(stored, key, value, present)
    if isinstance(present, nn.Parameter):
        _check_finite(stored, key, value, present)


def _check_finite(stored: StoredTensors, key: str, value: Tensor, present: Tensor) -> None:
    if value.is_floating_point() and not torch.isfinite(value.to(present.dtype)).all():
        raise UserError(
            f"{stored.file}: {key} holds numbers that are not finite in {present.dtype}, so that "
            f"the model would compute nothing else."
        )


def _shape_error(stored: StoredTensors, key: str, value: Tensor, present: Tensor) -> UserError:
    return UserError(
        f"{stored.file}: {key} is {tuple(value.shape)}, this model's is {tuple(present.shape)}."
    )


def _dtype_error(stored: StoredTensors, key: str, value: Tensor, present: Tensor) -> UserError:
    return UserError(f"{stored.file}: {key} is {value.dtype}, this model's is {present.dtype}.")


def _check_ranks(model: nn.Module, stored: StoredTensors, description: Mapping[str, Any]) -> None:
    """Refuse stated ranks that are not those of the tensors."""
    loaded = _sizes_by_place(model, adapter_names(description))
    paths = {path for entry in description["adapters"] for path in entry["layers"]}
    stated: dict[tuple[str, str], list[int]] = {}
    for key in sorted(description["ranks"], key=natural):
        stated.setdefault(place_of(key, paths), []).append(description["ranks"][key])
    for (path, axis_name), sizes in stated.items():
        present = loaded.get((path, axis_name), sizes)
        if present != sizes:
            raise UserError(
                f"{stored.file} is damaged: it states {some(map(str, sizes))} units for "
                f"{path}:{axis_name}, and its tensors have {some(map(str, present))}."
            )


def _sizes_by_place(model: nn.Module, names: Collection[str]) -> dict[tuple[str, str], list[int]]:
    """Return (path, axis) -> sizes of the axes of these adapters, innermost first."""
    sizes: dict[Member, int] = {}
    for axis in rank_axes(model).values():
        sizes[axis.members[0]] = len(axis)
    by_place: dict[tuple[str, str], list[int]] = {}
    for path, layer in wrapped_layers(model).items():
        for wrapper in wrappers_named(layer, names):
            for axis_name in wrapper.axes:
                if (wrapper, axis_name) in sizes:
                    found = by_place.setdefault((path, axis_name), [])
                    found.append(sizes[wrapper, axis_name])
    return by_place


# ---- what is done


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


def _tie_as_stored(adapters: Collection[StoredTensor], tied: Mapping[str, str]) -> None:
    """Tie the tensors that were tied when the adapter was saved, and untie all others.

    `adapt` ties the layers of one call, and the saved adapter may come from several calls.
    """
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for entry in sorted(adapters, key=lambda entry: entry.key in tied):
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
