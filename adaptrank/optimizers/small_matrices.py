"""Decompositions of many small matrices (r, r) by few calls, whatever their sizes.

Matrices of all pairs are padded with zeros to the largest r of a device, and decomposed in one
call. Padding is exact: it adds zero singular values and eigenvalues, and mixes with nothing.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def core_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype for matrices (r, r): float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def pseudo_inverses(stacks: Sequence[Tensor], eps: Sequence[float]) -> list[Tensor]:
    """Return the pseudo-inverse (..., r, w) of each matrix, zero for a zero matrix.

    Args:
        stacks: matrices (..., w, r).
        eps: for each stack, the smallest singular value that counts, over r times the largest.
    """
    inverses = []
    for R, (U, S, Vh), precision in zip(
        stacks, _together(torch.linalg.svd, stacks), eps, strict=True
    ):
        least = R.shape[-1] * precision * S[..., :1]
        inverse = torch.where(least < S, S.clamp_min(torch.finfo(S.dtype).tiny).reciprocal(), 0)
        K = (Vh.mT * inverse[..., None, :]) @ U.mT
        inverses.append(_cut(K, R.mT))
    return inverses


def eigenvalues(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Return the eigenvalues of symmetric matrices, ascending, padded to one length with zeros."""
    found = _together(lambda V: (torch.linalg.eigvalsh(V),), stacks)
    return [values for (values,) in found]


def functions(stacks: Sequence[Tensor], of: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """Return f(V) = Q diag(f(lam)) Q^T for symmetric V = Q diag(lam) Q^T, stack by stack."""
    results = []
    for V, (lam, Q), function in zip(stacks, _together(torch.linalg.eigh, stacks), of, strict=True):
        results.append(_cut((Q * function(lam)[..., None, :]) @ Q.mT, V))
    return results


def _cut(padded: Tensor, like: Tensor) -> Tensor:
    rows, columns = like.shape[-2:]
    return padded[..., :rows, :columns]


def _together(
    decompose: Callable[[Tensor], Sequence[Tensor]], stacks: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Decompose matrices of several sizes, in one call for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for number, matrices in enumerate(stacks):
        by_device.setdefault(matrices.device, []).append(number)
    width = max((max(matrices.shape[-2:]) for matrices in stacks), default=0)
    parts: dict[int, tuple[Tensor, ...]] = {}
    for numbers in by_device.values():
        flat = [_padded(stacks[number], width) for number in numbers]
        whole = decompose(torch.cat(flat))
        lengths = [len(part) for part in flat]
        split = [torch.split(tensor, lengths) for tensor in whole]
        for place, number in enumerate(numbers):
            leading = stacks[number].shape[:-2]
            found = (tensor[place] for tensor in split)
            parts[number] = tuple(part.reshape(*leading, *part.shape[1:]) for part in found)
    return [parts[number] for number in range(len(stacks))]


def _padded(matrices: Tensor, width: int) -> Tensor:
    """Return matrices (..., w, r) as (N, width, width)."""
    rows, columns = matrices.shape[-2:]
    flat = matrices.reshape(-1, rows, columns)
    return F.pad(flat, (0, width - columns, 0, width - rows))
