"""The tensors of a rank axis, and the slices that a fresh unit adds to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.parameterizations import Parameterization, start_scale

Member = tuple[Parameterization, str]
"""A wrapper, and the name of one of its axes."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an axis: attribute `name` of `layer`, whose dimension `dim` counts units.

    Args:
        layer: the wrapper that has the tensor.
        name: attribute of the wrapper.
        label: unique name in the axis. It is `name`, with ".1" for a further dimension of the same
            tensor, and with "@2" for the tensor of a tied layer that is not shared.
        dim: dimension that counts units.
        closes: whether the slices of a closed unit are zero here.
    """

    layer: Parameterization
    name: str
    label: str
    dim: int
    closes: bool

    @property
    def tensor(self) -> Tensor:
        """The current tensor. A parameter stays the same object when it is resized."""
        return cast(Tensor, getattr(self.layer, self.name))

    def select(self, units: Sequence[int]) -> Tensor:
        """Return the slices of these units. Dimension `dim` has length len(units)."""
        return self.tensor.detach().index_select(self.dim, self.index(units))

    def index(self, units: Sequence[int]) -> Tensor:
        """Return units as an index tensor on the device of the tensor."""
        return torch.tensor(list(units), dtype=torch.long, device=self.tensor.device)


def slots_of(members: Sequence[Member]) -> list[Slot]:
    """List the tensors of an axis, a tied one once, the closing factors last."""
    slots: list[Slot] = []
    seen: set[tuple[int, int]] = set()
    for number, (layer, axis) in enumerate(members):
        tensors = layer.axis_tensors(axis)
        closing_name = tensors[-1][0]
        earlier_names: set[str] = set()
        for name, dim in tensors:
            tensor = getattr(layer, name)
            further_dim = name in earlier_names
            earlier_names.add(name)
            if (id(tensor), dim) in seen:
                continue
            seen.add((id(tensor), dim))
            label = _label(f"{name}.{dim}" if further_dim else name, number)
            closes = further_dim or name == closing_name
            slots.append(Slot(layer, name, label, dim, closes))
    return sorted(slots, key=lambda slot: slot.closes)


def fresh_slices(
    key: str, members: Sequence[Member], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the new slices of each slot of an axis, by label.

    They are zero in the closing factors. In all others they come from the method's `fresh`.

    An empty axis may grow in a layer that adds nothing anyway, because another closing factor is
    zero or another axis is empty. Then the closing factors are drawn as well, because two zero
    factors would never learn.

    Args:
        key: of the axis, for error messages.
        members: of the axis.
        count: number of new units.
        generator: CPU generator for the random numbers of the method.
    """
    drawn: dict[str, Tensor] = {}
    for number, (layer, axis) in enumerate(members):
        for name, value in layer.fresh(axis, count, generator).items():
            drawn[_label(name, number)] = value
    slots = slots_of(members)
    is_empty = not slots[0].tensor.shape[slots[0].dim]
    draws_closing = is_empty and all(_is_closed_beside(layer, axis) for layer, axis in members)
    closing_names = {layer.axis_tensors(axis)[-1][0] for layer, axis in members}

    slices = {}
    # Of a tensor with several dimensions on the axis, the later dimensions see the earlier ones
    # grown already.
    grown_shapes: dict[int, list[int]] = {}
    for slot in slots:
        grown_shape = grown_shapes.setdefault(id(slot.tensor), list(slot.tensor.shape))
        shape = list(grown_shape)
        shape[slot.dim] = count
        grown_shape[slot.dim] += count
        if not slot.closes:
            value = drawn[slot.label]
        elif draws_closing or (is_empty and slot.name not in closing_names):
            scale = start_scale(slot.layer, slot.name, generator)
            value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            value = torch.zeros(shape)
        if list(value.shape) != shape:
            raise UserError(
                f"{key}: fresh() drew {tuple(value.shape)} for {slot.name}, not {tuple(shape)}."
            )
        slices[slot.label] = value.to(slot.tensor)
    return slices


def _is_closed_beside(layer: Parameterization, axis: str) -> bool:
    """Return whether a layer changes nothing, whatever the units of this axis are."""
    own_names = {name for name, _ in layer.axis_tensors(axis)}
    for other in layer.axes:
        if other == axis or axis not in layer.stopped_by(other):
            continue
        closing_name = layer.axis_tensors(other)[-1][0]
        is_closed = closing_name not in own_names and not getattr(layer, closing_name).any()
        if not layer.axis_size(other) or is_closed:
            return True
    return False


def _label(name: str, member: int) -> str:
    """Return the label of a tensor: its name, and from the second tied layer on its number."""
    return f"{name}@{member}" if member else name
