"""Cost of ranks: trainable parameters as a function of the sizes of the axes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from torch import Tensor, nn

from adaptrank.axes.model_axes import rank_axes
from adaptrank.parameterizations import Parameterization, wrappers


@dataclass(frozen=True)
class CostModel:
    """Cost of a model as a function of the sizes of its axes.

    cost = fixed + sum over terms of factor * product of the sizes of the term's axes

    Two axes may share a tensor, such as neighbouring bonds of a tensor train. One axis may be both
    dimensions of a square tensor. So costs do not add up unit by unit.

    Args:
        fixed: cost of all that depends on no axis.
        terms: (factor, keys of its axes) of each tensor. A key stands twice for a square tensor.
    """

    fixed: int
    terms: tuple[tuple[int, tuple[str, ...]], ...]

    @overload
    def total(self, sizes: Mapping[str, int]) -> int: ...
    @overload
    def total(self, sizes: Mapping[str, float]) -> float: ...
    def total(self, sizes: Mapping[str, float]) -> float:
        """Return the cost of these sizes."""
        cost: float = self.fixed
        for factor, axes in self.terms:
            cost += factor * math.prod(sizes[axis] for axis in axes)
        return cost

    def marginal(self, axis: str, sizes: Mapping[str, int]) -> int:
        """Return the cost of one more unit of an axis at these sizes."""
        cost = 0
        for factor, power, other_axes in self._terms_by_axis.get(axis, ()):
            growth = 1 if power == 1 else (sizes[axis] + 1) ** power - sizes[axis] ** power
            cost += factor * math.prod(sizes[other] for other in other_axes) * growth
        return cost

    def in_steps(self, steps: Mapping[str, int], fixed: Mapping[str, int]) -> "CostModel":
        """Return the same costs for sizes that count steps of several units.

        Args:
            steps: axis -> units in one step.
            fixed: axis -> units of an axis that does not change. Its cost becomes a fixed cost.
        """
        fixed_cost, terms = self.fixed, []
        for factor, axes in self.terms:
            units_per_step = [fixed[axis] if axis in fixed else steps[axis] for axis in axes]
            price = factor * math.prod(units_per_step)
            moving = tuple(axis for axis in axes if axis not in fixed)
            if moving:
                terms.append((price, moving))
            else:
                fixed_cost += price
        return CostModel(fixed_cost, tuple(terms))

    @cached_property
    def _terms_by_axis(self) -> dict[str, list[tuple[int, int, list[str]]]]:
        """Axis -> (factor, power of the axis, other axes) of each term that has the axis."""
        index: dict[str, list[tuple[int, int, list[str]]]] = {}
        for factor, axes in self.terms:
            for axis in dict.fromkeys(axes):
                other_axes = [other for other in axes if other != axis]
                power = len(axes) - len(other_axes)
                index.setdefault(axis, []).append((factor, power, other_axes))
        return index


def cost_model(model: nn.Module, left_out: Iterable[Parameterization] = ()) -> CostModel:
    """Return the cost of a model in trainable adapter parameters.

    A tensor that is on no axis counts as fixed. A tied tensor counts once.

    Args:
        model: holds the wrappers.
        left_out: wrappers whose tensors do not count.
    """
    not_counted = {id(wrapper) for wrapper in left_out}
    axes_of_tensor: dict[int, list[tuple[int, str]]] = {}
    for key, axis in rank_axes(model).items():
        for slot in axis.slots():
            dim = slot.dim % slot.tensor.dim()
            axes_of_tensor.setdefault(id(slot.tensor), []).append((dim, key))

    fixed, terms = 0, []
    counted: set[int] = set()
    for wrapper in wrappers(model):
        if id(wrapper) in not_counted:
            continue
        for _, parameter in wrapper.own_parameters():
            if id(parameter) in counted or not parameter.requires_grad:
                continue
            counted.add(id(parameter))
            on_axes = axes_of_tensor.get(id(parameter))
            if on_axes:
                terms.append(_term(parameter, on_axes))
            else:
                fixed += parameter.numel()
    return CostModel(fixed, tuple(terms))


def _term(parameter: Tensor, on_axes: list[tuple[int, str]]) -> tuple[int, tuple[str, ...]]:
    """Return the term of a parameter: the product of its other dimensions, and its axes."""
    axis_dims = [dim for dim, _ in on_axes]
    factor = math.prod(size for dim, size in enumerate(parameter.shape) if dim not in axis_dims)
    return factor, tuple(key for _, key in on_axes)


def rank_cost(axes: Iterable[str]) -> CostModel:
    """Return the cost in ranks: 1 for every unit of every axis."""
    return CostModel(0, tuple((1, (axis,)) for axis in axes))
