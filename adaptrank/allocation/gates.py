"""Trained gates: their own optimizer in batched kernels, and the proximal operator. Pure."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptrank.allocation.budget import Floor, floor_of
from adaptrank.axes import CostModel, RankAxis


@torch.no_grad()
def adam(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: int,
    learning_rates: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    raw_eps: bool = False,
) -> None:
    """Make one step of Adam without weight decay, in place, on all tensors at once.

    Source: arXiv:1412.6980. `raw_eps=True` is the form of the AdamW in transformers, which adds
    `eps` to the root of the second moment before the bias of the moment is corrected.

    Args:
        values: trained tensors.
        grads: gradients of the same shapes.
        first: first moments.
        second: second moments.
        step: number of this step, counted from 1, without the skipped ones.
        learning_rates: learning rate of each tensor.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        raw_eps: whether `eps` is added before the correction of the bias.
    """
    if not values:
        return
    first_correction = 1 - betas[0] ** step
    second_correction = 1 - betas[1] ** step
    torch._foreach_lerp_(list(first), list(grads), 1 - betas[0])
    torch._foreach_mul_(list(second), betas[1])
    torch._foreach_addcmul_(list(second), list(grads), list(grads), 1 - betas[1])
    denominators = list(torch._foreach_sqrt(list(second)))
    root_of_correction = second_correction**0.5
    torch._foreach_div_(denominators, root_of_correction)
    torch._foreach_add_(denominators, eps / root_of_correction if raw_eps else eps)
    step_sizes = [-rate / first_correction for rate in learning_rates]
    torch._foreach_addcdiv_(list(values), list(first), denominators, step_sizes)


def leaf(axis: RankAxis) -> Tensor:
    """Return zeros for a gate on each unit, (units,), without memory of their own.

    The dtype is float32 or better, because half precision would round small steps away.
    """
    closing = axis.closing()[0].tensor
    dtype = torch.promote_types(closing.dtype, torch.float32)
    return closing.new_zeros((), dtype=dtype).expand(len(axis))


def soft_threshold(values: Tensor, xi: float, reference: bool = False) -> Tensor:
    """Return prox(v) = sign(v) max(|v| - xi, 0), the proximal operator of xi |v|.

    `reference=True` is SoRA's release. It sets shrunk values below xi to zero once more, so that
    the dead zone is 2 xi wide.
    """
    shrunk = values.sign() * (values.abs() - xi).clamp_min(0)
    if reference:
        return shrunk * (shrunk.abs() >= xi)
    return shrunk


def threshold_for(
    sizes: Mapping[str, Tensor],
    cost: CostModel,
    budget: int,
    floor: Floor = 1,
    least: Mapping[str, float] | None = None,
) -> float:
    """Return the least xi whose proximal step leaves open what the budget pays for.

    All axes share this threshold, whatever their units cost. An axis whose `least` is larger is
    shrunk by that. The result is 0 if the budget holds anyway, and the largest size if no threshold
    is enough.

    Args:
        sizes: axis -> |g|, (units,).
        cost: cost model in the unit of the budget.
        budget: largest cost of the open units.
        floor: units of an axis that count as open even if all of its gates are zero.
        least: axis -> threshold that it has in any case; 0 for an axis that is left out.
    """
    least = least or {}
    values = torch.cat([gates.flatten() for gates in sizes.values()])
    levels: list[float] = [0.0, *values[values > 0].sort().values.tolist()]

    def fits(xi: float) -> bool:
        open_units = {}
        for key, gates in sizes.items():
            above = int((gates > max(xi, least.get(key, 0.0))).sum())
            open_units[key] = max(above, min(floor_of(floor, key), len(gates)))
        return cost.total(open_units) <= budget

    # A higher threshold never leaves more units open, so bisection finds the first level.
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(levels[middle]):
            high = middle
        else:
            low = middle + 1
    return levels[low]
