"""TIES' last two steps: elect a sign for each entry, and average the entries that have it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def elected_signs(matrices: Sequence[Tensor], weights: Sequence[float], how: str) -> Tensor:
    """Return the elected sign of each entry: 1, -1, or 0 where the sum is zero.

    Args:
        matrices: trimmed changes, (m, n) each.
        weights: one for each matrix.
        how: "total", the sign of the weighted sum, or "frequency", the sign of most entries. In a
            draw of entries it is 1.
    """
    votes = torch.zeros_like(matrices[0])
    for D, weight in zip(matrices, weights, strict=True):
        votes += weight * D if how == "total" else (weight * D).sign()
    if how == "frequency":
        # Nobody votes where all are zero, and there the sign does not matter.
        return torch.where(votes < 0, -1.0, 1.0).to(votes)
    return votes.sign_()


def balance(signs: Tensor) -> int:
    """Return how many more entries are positive than negative."""
    return int(signs.sum(dtype=torch.float64))


def mean_of_elected(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    signs: Tensor,
    undecided: int,
    scale: float,
    normalize: str,
) -> Tensor:
    """Return scale times the mean of the weighted entries that have the elected sign.

    Args:
        matrices: trimmed changes, (m, n) each.
        weights: one for each matrix.
        signs: elected signs, (m, n).
        undecided: has the sign of entries whose sum is zero. 0 means -, as in the released code.
        scale: factor of the result.
        normalize: divide by the "count" of entries, or by the sum of their |"weights"|.
    """
    positive = torch.where(signs == 0, undecided, signs) > 0
    added, divisor = torch.zeros_like(matrices[0]), torch.zeros_like(matrices[0])
    for D, weight in zip(matrices, weights, strict=True):
        weighted = weight * D
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        added += weighted * agrees
        divisor += agrees * (abs(weight) if normalize == "weights" else 1.0)
    # An entry that no change has is zero, whatever it is divided by.
    return scale * added / divisor.clamp_min(torch.finfo(divisor.dtype).tiny)
