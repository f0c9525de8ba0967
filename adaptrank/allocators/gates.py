"""Trained gates: an optimizer of their own, as the released codes have it, in batched kernels; and the proximal operator. Pure."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adam(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of Adam without weight decay, in place, on all tensors at once (arXiv:1412.6980).

    Args:
        values: what is trained.
        grads: of the same shapes.
        first, second: the moments.
        step: counts from 1.
        lr: learning rate.
    """
    if not values:
        return
    torch._foreach_lerp_(list(first), list(grads), 1 - betas[0])
    torch._foreach_mul_(list(second), betas[1])
    torch._foreach_addcmul_(list(second), list(grads), list(grads), 1 - betas[1])
    roots = list(torch._foreach_sqrt(list(second)))
    torch._foreach_div_(roots, (1 - betas[1] ** step) ** 0.5)
    torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(list(values), list(first), roots, -lr / (1 - betas[0] ** step))


def soft_threshold(values: Tensor, xi: float, reference: bool = False) -> Tensor:
    """prox(v) = sign(v) max(|v| - xi, 0), the proximal operator of xi |v|.

    `reference=True` is SoRA's release: what is shrunk is set to zero below xi once more, so that the dead zone is 2 xi wide.
    """
    shrunk = values.sign() * (values.abs() - xi).clamp_min(0)
    return shrunk * (shrunk.abs() >= xi) if reference else shrunk


def threshold_for(values: Tensor, most: int) -> float:
    """The least xi whose proximal step leaves at most `most` values that are not zero; 0 where there are not more anyway."""
    sizes = values.abs().sort(descending=True).values
    return 0.0 if most >= int((sizes > 0).sum()) else float(sizes[most])
