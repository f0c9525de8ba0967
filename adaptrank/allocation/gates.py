"""Trained gates: their own optimizer in batched kernels, and the proximal operator. Pure."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adaptrank.allocation.budget import Floor, floor_of
from adaptrank.axes import CostModel, RankAxis
from adaptrank.training.moving import to_device


@torch.no_grad()
def adam(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: int | Tensor,
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
        step: number of this step, counted from 1, without the skipped ones. A tensor () on the
            device is not read.
        learning_rates: learning rate of each tensor.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        raw_eps: whether `eps` is added before the correction of the bias.
    """
    if not values:
        return
    exact = torch.float32 if values[0].device.type == "mps" else torch.float64
    steps = torch.as_tensor(step, dtype=exact, device=values[0].device)
    first_correction = 1 - betas[0] ** steps
    root_of_correction = (1 - betas[1] ** steps).sqrt()
    torch._foreach_lerp_(list(first), list(grads), 1 - betas[0])
    torch._foreach_mul_(list(second), betas[1])
    torch._foreach_addcmul_(list(second), list(grads), list(grads), 1 - betas[1])
    denominators = list(torch._foreach_sqrt(list(second)))
    if raw_eps:
        torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(denominators, 1 / root_of_correction)
    if not raw_eps:
        torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(denominators, first_correction)
    rates = [-rate for rate in learning_rates]
    torch._foreach_addcdiv_(list(values), list(first), denominators, rates)


def leaf(axis: RankAxis) -> Tensor:
    """Return zeros for a gate on each unit, (units,), without memory of their own.

    The dtype is float32 or better, because half precision would round small steps away.
    """
    closing = axis.closing()[0].tensor
    dtype = torch.promote_types(closing.dtype, torch.float32)
    return closing.new_zeros((), dtype=dtype).expand(len(axis))


def soft_threshold(values: Tensor, xi: float | Tensor, reference: bool = False) -> Tensor:
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
) -> Tensor:
    """Return the least xi whose proximal step leaves open what the budget pays for, ().

    All axes share this threshold, whatever their units cost. An axis whose `least` is larger is
    shrunk by that. The result is 0 if the budget holds anyway, and the largest size if no threshold
    is enough. It is found on the device, which is not read.

    Args:
        sizes: axis -> |g|, (units,).
        cost: cost model in the unit of the budget.
        budget: largest cost of the open units.
        floor: units of an axis that count as open even if all of its gates are zero.
        least: axis -> threshold that it has in any case; 0 for an axis that is left out.
    """
    least = least or {}
    keys = list(sizes)
    values = torch.cat([sizes[key].flatten() for key in keys])
    levels = torch.cat([values.new_zeros(1), values]).sort().values
    if not len(values):
        return levels[0]
    # Negative padding is never above a level.
    padded = pad_sequence([sizes[key] for key in keys], batch_first=True, padding_value=-1.0)
    bounds = torch.tensor([least.get(key, 0.0) for key in keys], dtype=values.dtype)
    bounds = to_device(bounds, values)
    floors = [min(floor_of(floor, key), len(sizes[key])) for key in keys]

    # Open units of each axis at each level, (axes, levels).
    thresholds = torch.maximum(levels, bounds[:, None])
    above = padded.shape[1] - torch.searchsorted(padded.sort().values, thresholds, right=True)
    counts = torch.maximum(above, to_device(torch.tensor(floors), values)[:, None])
    # A cost is a sum of products, of numbers or of tensors.
    sizes_at_levels = cast(dict[str, float], dict(zip(keys, counts.unbind(), strict=True)))
    costs = cost.total(sizes_at_levels)

    # A higher level never leaves more units open, so the levels that do not fit come first.
    too_low = (torch.as_tensor(costs, device=values.device) > budget).sum()
    return levels.index_select(0, too_low.clamp(max=len(values)).view(1)).squeeze(0)
