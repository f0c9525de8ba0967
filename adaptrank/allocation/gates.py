"""Trained gates: an optimizer of their own, as the released codes have it, in batched kernels; and the proximal operator. Pure."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptrank.axes import CostModel, RankAxis


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
        step: counts from 1, steps that were skipped left out.
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


def leaf(axis: RankAxis) -> Tensor:
    """Zeros for a gate on each unit, (units,), in float32 or better: half precision would round small steps away."""
    like = axis.closing()[0].tensor
    return like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32)).expand(
        len(axis)
    )


def soft_threshold(values: Tensor, xi: float, reference: bool = False) -> Tensor:
    """prox(v) = sign(v) max(|v| - xi, 0), the proximal operator of xi |v|.

    `reference=True` is SoRA's release: what is shrunk is set to zero below xi once more, so that the dead zone is 2 xi wide.
    """
    shrunk = values.sign() * (values.abs() - xi).clamp_min(0)
    return shrunk * (shrunk.abs() >= xi) if reference else shrunk


def threshold_for(
    sizes: Mapping[str, Tensor], cost: CostModel, budget: int, floor: int = 1
) -> float:
    """The least xi whose proximal step leaves open what the budget pays for; 0 where that is so anyway.

    One threshold for all axes, whatever their units cost; where none is enough it is the largest size.

    Args:
        sizes: axis -> |g|, (units,).
        cost: in the unit of the budget.
        budget: largest cost of what is open.
        floor: units of an axis that count as open even where all its gates are zero.
    """
    values = torch.cat([v.flatten() for v in sizes.values()])
    levels: list[float] = [0.0, *values[values > 0].sort().values.tolist()]  # ascending

    def fits(xi: float) -> bool:
        return (
            cost.total(
                {key: max(int((v > xi).sum()), min(floor, len(v))) for key, v in sizes.items()}
            )
            <= budget
        )

    low, high = 0, len(levels) - 1
    while low < high:  # a higher threshold never leaves more
        middle = (low + high) // 2
        low, high = (low, middle) if fits(levels[middle]) else (middle + 1, high)
    return levels[low]
