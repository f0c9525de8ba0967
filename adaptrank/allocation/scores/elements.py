"""Trainable tensors of rank axes, and running averages of their entries."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptrank.allocation.scores.importance import Axes
from adaptrank.axes import RankAxis


@dataclass(frozen=True)
class Elements:
    """A trainable tensor and all rank axes that index it, deduplicated.

    Args:
        axis: first axis that has the tensor. It owns the running averages.
        label: name of the tensor in that axis.
        tensor: current tensor.
        where: (axis key, dimension that counts its units), for all axes that have the tensor.
    """

    axis: RankAxis
    label: str
    tensor: Tensor
    where: tuple[tuple[str, int], ...]

    @property
    def is_gate(self) -> bool:
        """Whether the tensor is one number for each unit that closes it, and so a gate already."""
        if self.tensor.dim() != 1:
            return False
        return any(slot.closes for slot in self.axis.slots() if slot.tensor is self.tensor)


def elements(axes: Axes) -> list[Elements]:
    """Return each trainable tensor of the axes once.

    Two axes may share a tensor, and a square tensor has its axis twice.
    """
    by_tensor: dict[int, Elements] = {}
    for key, axis in axes.items():
        for slot in axis.slots():
            if not slot.tensor.requires_grad:
                continue
            place = (key, slot.dim)
            known = by_tensor.get(id(slot.tensor))
            if known is None:
                element = Elements(axis, slot.label, slot.tensor, (place,))
            else:
                element = replace(known, where=(*known.where, place))
            by_tensor[id(slot.tensor)] = element
    return list(by_tensor.values())


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Return the start of a running average: zeros that take no memory until they are needed."""
    return like.new_zeros(()).expand(shape or like.shape)


def update_averages(averages: list[Tensor], values: list[Tensor], beta: float) -> None:
    """Set average <- beta average + (1 - beta) value, in place, for all tensors at once.

    There is no bias correction, as in the released codes.
    """
    if averages:
        torch._foreach_lerp_(averages, values, 1 - beta)
