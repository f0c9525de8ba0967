"""Gradients that have derivatives of their own, for autograd functions written by hand."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    g: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a formula, computed by autograd, which can differentiate them again.

    A backward pass by hand works with rounded copies and with results that autograd did not see.
    It calls this instead if a second derivative is wanted.

    Args:
        formula: the function in PyTorch's own operations.
        inputs: its arguments.
        needed: whether the gradient of each input is needed. The gradients of the others are None.
        g: gradient of the output.
    """
    # One input may be computed from another. An alias ends the path of each.
    aliases = [None if value is None else value.view_as(value) for value in inputs]
    wanted = [
        alias for alias, need in zip(aliases, needed, strict=True) if need and alias is not None
    ]
    y = formula(*aliases)
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
    return tuple(next(found) if need else None for need in needed)
