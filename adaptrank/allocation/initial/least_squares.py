"""Least-squares fit of the change that an axis makes to given matrices."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptrank.axes import RankAxis
from adaptrank.parameterizations import Parameterization

Vector = list[Tensor]
"""A vector in several tensors, such as all closing factors of an axis."""


@torch.no_grad()
def fit_change(axis: RankAxis, targets: list[Tensor | None], steps: int = 50) -> None:
    """Set the closing factors c of an axis to minimize sum ||D(c) - T||^2 over its layers.

    D is the change of the dense weight. It is linear in the closing factors, so conjugate
    gradients on the normal equations need only the method's own `weight` and its derivative.

    Args:
        axis: axis whose closing factors are set.
        targets: T of each layer of the axis, (m, n), or None to ignore the layer.
        steps: most steps of conjugate gradients.
    """
    layers, wanted = [], []
    for (layer, _), target in zip(axis.members, targets, strict=True):
        if target is not None:
            layers.append(layer)
            wanted.append(target)
    if not layers:
        return
    change = _LinearChange(layers, axis)
    residuals = [target.to(base) for target, base in zip(wanted, change.bases, strict=True)]
    right = change.adjoint(residuals)
    solution = conjugate_gradients(lambda c: change.adjoint(change(c)), right, steps)
    change.set_factors(solution)


class _LinearChange:
    """The linear map from closing factors to the change of each layer's dense weight.

    Args:
        layers: layers whose change is counted.
        axis: axis that owns the closing factors. They are set to zero.
    """

    def __init__(self, layers: Sequence[Parameterization], axis: RankAxis) -> None:
        self.layers = layers
        self.factors = list({id(slot.tensor): slot.tensor for slot in axis.closing()}.values())
        for factor in self.factors:
            factor.data.zero_()
        self.bases = [layer.dense().detach() for layer in layers]
        """Dense weights at closing factors of zero."""

    def __call__(self, factors: Vector) -> Vector:
        """Return D of each layer, (m, n)."""
        self.set_factors(factors)
        return [
            layer.dense().detach() - base
            for layer, base in zip(self.layers, self.bases, strict=True)
        ]

    def adjoint(self, residuals: Vector) -> Vector:
        """Return the transposed map: the gradient of sum <D, R> in the closing factors."""
        with torch.enable_grad():
            products = []
            for layer, residual in zip(self.layers, residuals, strict=True):
                products.append((layer.dense() * residual).sum())
            total = sum(products)
            assert isinstance(total, Tensor)
            return list(torch.autograd.grad(total, self.factors))

    def set_factors(self, values: Vector) -> None:
        for factor, value in zip(self.factors, values, strict=True):
            factor.data.copy_(value)


def conjugate_gradients(apply: Callable[[Vector], Vector], right: Vector, steps: int) -> Vector:
    """Solve H c = b from c = 0. Stop at machine precision.

    Args:
        apply: c -> H c for a symmetric positive semidefinite H.
        right: b.
        steps: most steps.
    """
    solution = [torch.zeros_like(tensor) for tensor in right]
    residual = right
    direction = [tensor.clone() for tensor in residual]
    size = _dot(residual, residual)
    smallest = size * (10 * torch.finfo(right[0].dtype).eps) ** 2
    for _ in range(steps):
        if size <= smallest:
            break
        image = apply(direction)
        curvature = _dot(direction, image)
        if curvature <= 0:
            break
        step = size / curvature
        solution = _add(solution, step, direction)
        residual = _add(residual, -step, image)
        previous_size, size = size, _dot(residual, residual)
        direction = _add(residual, size / previous_size, direction)
    return solution


def _add(vector: Vector, factor: float, other: Vector) -> Vector:
    return [a + factor * b for a, b in zip(vector, other, strict=True)]


def _dot(vector: Vector, other: Vector) -> float:
    return float(
        sum(float((a.double() * b.double()).sum()) for a, b in zip(vector, other, strict=True))
    )
