"""Operators: several changes of one weight and their weights -> one change. Pure, deterministic, and all in delta space.

Working on factors entry by entry would depend on how a product is factored; here no result does. Those that look at entries form
the (m, n) matrices of one layer at a time.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.composition.changes import Change, Dense, Product, total

Operator = Callable[..., Change]
"""(changes, weights, key, **options) -> change; `key` names the layer, for what is drawn."""


def add(changes: Sequence[Change], weights: Sequence[float], key: str = "") -> Change:
    """sum_i w_i D_i (naive LoRA summation, arXiv:2508.11985): exact; of products by putting factors side by side."""
    return total(changes, weights)


def magnitude_prune(
    changes: Sequence[Change], weights: Sequence[float], key: str = "", density: float = 0.2
) -> Change:
    """sum_i w_i trim(D_i): of each change the largest entries alone.

    Args:
        density: fraction of the entries of each change that stays, in (0, 1].
    """
    _in_range("density", density, 0, 1)
    return _sum([_trim(change.dense(), density) for change in changes], weights)


def ties(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    density: float = 0.2,
    scale: float = 1.0,
    elect: Literal["total", "frequency"] = "total",
    normalize: Literal["count", "weights"] = "count",
) -> Change:
    """TIES (arXiv:2306.01708): trim, elect a sign for each entry, then the mean of those that agree with it.

    With weights of one it is a mean and not a sum: of two changes that never meet it is the sum, of two equal ones it is either.

    Args:
        density: fraction of the entries of each change that stays, in (0, 1].
        scale: lambda, of the result.
        elect: the sign of the weighted sum, or that of most changes; of zero it is +.
        normalize: divide by the number of changes that agree, or by the sum of their |weights|.
    """
    _in_range("density", density, 0, 1)
    _one_of("elect", elect, ("total", "frequency"))
    _one_of("normalize", normalize, ("count", "weights"))
    return Dense(
        _ties(
            [_trim(change.dense(), density) for change in changes], weights, scale, elect, normalize
        )
    )


def dare(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    drop: float = 0.5,
    seed: int = 0,
) -> Change:
    """DARE (arXiv:2311.03099): sum_i w_i M_i D_i / (1 - drop), M_i zeros and ones; its mean over seeds is the sum.

    Args:
        drop: probability that an entry is dropped, in [0, 1).
        seed: of what is dropped; each change and each layer draws its own.
    """
    return _sum(_dropped(changes, key, drop, seed), weights)


def dare_ties(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    drop: float = 0.5,
    seed: int = 0,
    scale: float = 1.0,
    elect: Literal["total", "frequency"] = "total",
    normalize: Literal["count", "weights"] = "count",
) -> Change:
    """DARE, then TIES without trimming.

    Args:
        drop: as in `dare`.
        seed: as in `dare`.
        scale: as in `ties`.
        elect: as in `ties`.
        normalize: as in `ties`.
    """
    _one_of("elect", elect, ("total", "frequency"))
    _one_of("normalize", normalize, ("count", "weights"))
    return Dense(_ties(_dropped(changes, key, drop, seed), weights, scale, elect, normalize))


def knots(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    within: Literal["ties", "dare_ties", "magnitude_prune", "dare", "sum"] = "ties",
    cut: float = 1e-9,
    **options: Any,
) -> Change:
    """KnOTS (arXiv:2410.19735): merge in the basis that all changes share, [D_1 ... D_N] = U S [V_1 ... V_N]^T, with blocks X_i = S V_i^T.

    The result is U X, X being what another operator makes of the blocks; with the sum it is the sum. Of products no (m, n) matrix is
    formed, but for the blocks, (R, n) each, where R is the sum of the ranks.

    Args:
        within: operator on the blocks.
        cut: singular values below this fraction of the largest are dropped (the release drops those below 1e-5 absolute).
        options: of that operator.
    """
    _one_of("within", within, tuple(name for name in OPERATORS if name != "knots"))
    U, S, blocks = _joint(changes)
    kept = cut * S[0] < S if len(S) else S.new_zeros(0, dtype=torch.bool)
    U, S = U[:, kept], S[kept]
    X = [Dense(S[:, None] * block[kept]) for block in blocks]
    if not len(S):
        return total(changes, weights)
    merged = OPERATORS[within](X, weights, key, **options)
    like = _like(changes[0])
    return Product(U.to(like), merged.dense().to(like))


OPERATORS: Mapping[str, Operator] = {
    "sum": add,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
    "knots": knots,
}
"""By name."""


def options_of(operator: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given options that the operator knows.

    Raises:
        ValueError: for one that it does not know; its own are named.
    """
    known = list(inspect.signature(OPERATORS[operator]).parameters)[3:]
    if operator == "knots":
        within = values.get("within", "ties")
        known = [
            "within",
            "cut",
            *(
                list(inspect.signature(OPERATORS[within]).parameters)[3:]
                if within in OPERATORS
                else []
            ),
        ]
    for name in values:
        if name not in known:
            raise UserError(
                f"{operator} has no option {name!r}; it has {', '.join(known) or 'none'}."
            )
    return dict(values)


def _like(change: Change) -> Tensor:
    return change.U if isinstance(change, Product) else change.D


def _sum(matrices: Sequence[Tensor], weights: Sequence[float]) -> Dense:
    result = torch.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        result.add_(matrix, alpha=weight)
    return Dense(result)


def _trim(D: Tensor, density: float) -> Tensor:
    """The ceil(density * size) largest entries by |value|, the others zero; ties fall to the lower index."""
    count = math.ceil(density * D.numel())
    if count >= D.numel():
        return D
    order = D.abs().flatten().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(D.numel(), dtype=torch.bool, device=D.device)
    mask[order] = True
    return D * mask.view_as(D)


def _ties(
    matrices: Sequence[Tensor], weights: Sequence[float], scale: float, elect: str, normalize: str
) -> Tensor:
    stacked = torch.stack([w * D for D, w in zip(matrices, weights, strict=True)])
    votes = stacked if elect == "total" else stacked.sign()
    sign = torch.where(votes.sum(0) < 0, -1.0, 1.0).to(stacked)
    agree = (stacked.sign() == sign) & (stacked != 0)
    counted = agree.to(stacked)
    if normalize == "weights":
        counted = counted * torch.tensor(
            weights, dtype=stacked.dtype, device=stacked.device
        ).abs().view(-1, 1, 1)
    # An entry that no change has is zero, whatever it is divided by.
    merged: Tensor = (
        scale * (stacked * agree).sum(0) / counted.sum(0).clamp_min(torch.finfo(stacked.dtype).tiny)
    )
    return merged


def _dropped(changes: Sequence[Change], key: str, drop: float, seed: int) -> list[Tensor]:
    _in_range("drop", 1 - drop, 0, 1, f"drop={drop}: a probability of at least 0 and below 1.")
    found = []
    for position, change in enumerate(changes):
        D = change.dense()
        digest = hashlib.blake2b(f"{seed}/{position}/{key}".encode(), digest_size=8).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        kept = torch.rand(D.shape, generator=random).to(D.device) >= drop
        found.append(D * kept / (1 - drop))
    return found


def _joint(changes: Sequence[Change]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """U (m, R), S (R,), and V_i^T (R, n) of each change, of [D_1 | D_2 | ...] = U S [V_1^T | V_2^T | ...], float64."""
    if all(isinstance(change, Product) for change in changes):
        products = [change for change in changes if isinstance(change, Product)]
        Q, R = torch.linalg.qr(torch.cat([p.U.double() for p in products], 1))
        bases, cores = zip(*(torch.linalg.qr(p.V.double().T) for p in products), strict=True)
        block: Tensor = torch.block_diag(*(core.T for core in cores))  # type: ignore[no-untyped-call]
        u, S, vh = torch.linalg.svd(R @ block, full_matrices=False)
        parts = vh.split([basis.shape[1] for basis in bases], 1)
        return Q @ u, S, [part @ basis.T for part, basis in zip(parts, bases, strict=True)]
    matrices = [change.dense().double() for change in changes]
    U, S, Vh = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
    return U, S, list(Vh.split([D.shape[1] for D in matrices], 1))


def _in_range(name: str, value: float, above: float, most: float, sentence: str = "") -> None:
    if not above < value <= most:
        raise UserError(sentence or f"{name}={value}: above {above}, and at most {most}.")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r}: one of {', '.join(allowed)}.")
