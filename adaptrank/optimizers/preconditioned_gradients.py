"""Gradients of two factors, each multiplied by the inverse of the other's Gram matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrank.optimizers.factor_pairs import Factor, stack
from adaptrank.optimizers.small_matrices import core_dtype

SMALLEST_DAMPING = 1e-12
"""Damping of a dual that is zero."""


def preconditioned(
    pairs: Sequence[tuple[Factor, ...]], groups: Mapping[int, dict[str, Any]]
) -> list[tuple[Tensor, Tensor]]:
    """Return (parameter, g (D^T D + d I)^-1) of each moving factor, with its dual D (e, r).

    d = damping * tr(D^T D) / r + 1e-12, with the damping of the factor's group. All duals are from
    before the step.
    """
    alike: dict[Any, list[Factor]] = {}
    for factor in (factor for factors in pairs for factor in factors):
        blocks = None if factor.pair.blocks is None else factor.pair.blocks.shape
        group = groups[id(factor.tensor)]
        shapes = (factor.side, factor.tensor.shape, factor.dual.tensor.shape, blocks)
        key = (*shapes, factor.tensor.dtype, factor.tensor.device, group["damping"])
        alike.setdefault(key, []).append(factor)
    found = []
    for factors in alike.values():
        damping = groups[id(factors[0].tensor)]["damping"]
        for factor, gradient in zip(factors, _stacked(factors, damping), strict=True):
            in_its_form = factor.unblock(gradient).to(factor.tensor.dtype)
            found.append((factor.tensor, in_its_form.contiguous()))
    return found


def _stacked(factors: Sequence[Factor], damping: float) -> Tensor:
    """Return the preconditioned gradients of factors of equal shapes, (g, k, d, r)."""
    dtype = torch.promote_types(torch.float32, factors[0].tensor.dtype)
    dual = stack([factor.dual.blocks(factor.dual.tensor) for factor in factors], dtype)
    gram = dual.mT @ dual
    core = gram.to(core_dtype(gram))
    mean = core.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(core.shape[-1], device=core.device, dtype=core.dtype)
    damped = core + (damping * mean + SMALLEST_DAMPING)[..., None, None] * eye
    # `inv` would wait for the device, to see whether it succeeded.
    inverse, _ = torch.linalg.inv_ex(damped)
    gradients = [factor.blocks(_gradient(factor)) for factor in factors]
    conditioned: Tensor = stack(gradients, dtype) @ inverse.to(dtype)
    return conditioned


def _gradient(factor: Factor) -> Tensor:
    gradient = factor.tensor.grad
    assert gradient is not None, "factors without a gradient do not move"
    return gradient
