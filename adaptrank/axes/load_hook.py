"""Let `load_state_dict` of an adapted model give its axes the sizes that are stored."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.axes.model_axes import fit_ranks, rank_axes
from adaptrank.parameterizations import wrapped_layers, wrappers


def fit_on_load(model: nn.Module) -> None:
    """Register a load pre-hook that fits the ranks of a model, once.

    The hook does nothing where all sizes agree. A state dict with some tensors of an axis or a
    stack, and not all, leaves its size as it is.
    """
    if not _hook_keys(model):
        model.register_load_state_dict_pre_hook(_fit)  # type: ignore[no-untyped-call]


def stop_fitting(model: nn.Module) -> None:
    """Remove the hook of `fit_on_load` from a model without wrappers, and from all its modules."""
    if wrapped_layers(model):
        return
    for module in model.modules():
        for key in _hook_keys(module):
            del module._load_state_dict_pre_hooks[key]


def _hook_keys(module: nn.Module) -> list[int]:
    hooks = module._load_state_dict_pre_hooks
    return [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _fit]


def _fit(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    errors: list[str],
) -> None:
    """Give the axes and stacks of a model the sizes in a state dict.

    A size that cannot be goes into the list of errors, which PyTorch raises after loading.
    """
    stored = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
    paths = {module: f"{path}." if path else "" for path, module in model.named_modules()}
    if not _sizes_differ(model, stored, paths):
        return
    partial: set[str] = set()
    for names in _resized_together(model, paths):
        if not names <= stored.keys():
            partial |= names
    try:
        fit_ranks(model, {name: stored[name] for name in stored.keys() - partial})
    except UserError as error:
        errors.append(str(error))


def _sizes_differ(
    model: nn.Module, stored: Mapping[str, Tensor], paths: Mapping[nn.Module, str]
) -> bool:
    for wrapper in wrappers(model):
        for name, tensor in wrapper.own_tensors().items():
            value = stored.get(paths[wrapper] + name)
            if value is not None and value.shape != tensor.shape:
                return True
    return False


def _resized_together(model: nn.Module, paths: Mapping[nn.Module, str]) -> list[set[str]]:
    """Return the names of the saved tensors of each axis and of each stack."""
    saved = {wrapper: wrapper.own_tensors().keys() for wrapper in wrappers(model)}
    groups = []
    for axis in rank_axes(model).values():
        names: set[str] = set()
        for wrapper, axis_name in axis.members:
            tensors = {name for name, _ in wrapper.axis_tensors(axis_name)}
            names |= {paths[wrapper] + name for name in tensors & saved[wrapper]}
        groups.append(names)
    for wrapper, own in saved.items():
        for stack in wrapper.stacks.values():
            groups.append({paths[wrapper] + name for name in stack.keys() & own})
    return groups
