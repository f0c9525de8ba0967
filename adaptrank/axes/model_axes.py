"""The rank axes of a model, their order, and their sizes as a state dict has them."""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.axes.axis import RankAxis
from adaptrank.axes.slot import Member
from adaptrank.axes.stacks import resize_stack, stored_stacks
from adaptrank.parameterizations import Parameterization, wrapped_layers, wrappers

CLOSED = "closed_units"
"""Attribute of a model with closed units, while an allocator trains it: {axis key: units}."""


def rank_axes(model: nn.Module) -> dict[str, RankAxis]:
    """Return every rank axis of a model by its key, in natural order of the paths.

    Layers that share a tensor of an axis are one axis, which has the key of the first of them.
    """
    layers = wrapped_layers(model)
    members = _keyed_members(layers)
    members.sort(key=lambda member: natural(member[0]))

    groups: dict[str, list[Member]] = {}
    key_of_tensor: dict[tuple[int, int], str] = {}
    for key, wrapper, axis in members:
        tensors = [(id(getattr(wrapper, name)), dim) for name, dim in wrapper.axis_tensors(axis)]
        tied_to = next(
            (key_of_tensor[tensor] for tensor in tensors if tensor in key_of_tensor), key
        )
        groups.setdefault(tied_to, []).append((wrapper, axis))
        key_of_tensor.update(dict.fromkeys(tensors, tied_to))

    nests = [_training_wrappers(layer) for layer in layers.values()]
    nested_wrappers = {id(wrapper) for nest in nests if len(nest) > 1 for wrapper in nest}
    axes = {}
    for key, group in groups.items():
        nested = any(id(wrapper) in nested_wrappers for wrapper, _ in group)
        axes[key] = RankAxis(key, group, nested)
    return axes


def _keyed_members(
    layers: Mapping[str, Parameterization],
) -> list[tuple[str, Parameterization, str]]:
    """List (key, wrapper, name of the axis). The position in the nest joins the path if need be."""
    members = []
    for path, layer in layers.items():
        nest = _training_wrappers(layer)
        uses = Counter(axis for wrapper in nest for axis in wrapper.axes)
        for position, wrapper in enumerate(nest):
            for axis in wrapper.axes:
                owner = path if uses[axis] == 1 else f"{path}.{position}"
                members.append((f"{owner}:{axis}", wrapper, axis))
    return members


def _training_wrappers(layer: Parameterization) -> list[Parameterization]:
    """Return the wrappers of a layer that have parameters, innermost first.

    So what earlier rounds have merged, which has none, does not count as a part of the nest.
    """
    return [wrapper for wrapper in layer.nest if next(wrapper.own_parameters(), None) is not None]


def natural(key: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers as numbers: layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def fit_ranks(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Resize axes and stacks to the shapes in a state dict of the model, so that it loads strictly.

    Raises:
        ValueError: if the tensors of one axis are stored with different sizes, or with a size that
            the axis cannot have.
    """
    paths = {module: path for path, module in model.named_modules()}
    resized: list[tuple[RankAxis, int]] = []
    for key, axis in rank_axes(model).items():
        sizes = _stored_sizes(axis, paths, state_dict)
        if not sizes:
            continue
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
            raise UserError(
                f"The tensors of {key} were stored with different ranks ({listed}); "
                f"the file is damaged."
            )
        size = next(iter(sizes.values()))
        if size == len(axis):
            continue
        if not axis.allows(size):
            least, largest = axis.limits()
            raise UserError(
                f"{key} was stored with {size} units, and holds {least} to "
                f"{largest or 'any number'} here; the file is damaged, or of another model."
            )
        resized.append((axis, size))
    stacks = list(stored_stacks(model, state_dict))
    # All sizes are checked before the first tensor changes.
    for axis, size in resized:
        axis.resize_to(size)
    for wrapper, stack, size in stacks:
        resize_stack(wrapper, stack, size)
    for wrapper in wrappers(model):
        wrapper.renew()


def _stored_sizes(
    axis: RankAxis, paths: Mapping[nn.Module, str], state_dict: Mapping[str, Tensor]
) -> dict[str, int]:
    """Return the size of the axis in each of its stored tensors, by the tensor's full name."""
    sizes: dict[str, int] = {}
    for layer, axis_name in axis.members:
        for tensor_name, dim in layer.axis_tensors(axis_name):
            full_name = f"{paths[layer]}.{tensor_name}".removeprefix(".")
            if full_name not in state_dict:
                continue
            stored_shape = state_dict[full_name].shape
            dimensions = getattr(layer, tensor_name).dim()
            if len(stored_shape) != dimensions:
                raise UserError(
                    f"{full_name} was stored with shape {tuple(stored_shape)}, and has "
                    f"{dimensions} dimension(s) here; the file is damaged, or of another model."
                )
            # A square tensor has two dimensions on one axis.
            label = f"{full_name}.{dim}" if full_name in sizes else full_name
            sizes[label] = stored_shape[dim]
    return sizes
