"""Operators: several changes of one weight and their weights -> one change.

Operators are pure and deterministic, and work in delta space. Working on factors entry by entry
would depend on how a product is factored. Operators that look at entries form the (m, n) matrices
of one layer at a time.
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
"""(changes, weights, key, **options) -> change. `key` names the layer, for random numbers."""


def add(changes: Sequence[Change], weights: Sequence[float], key: str = "") -> Change:
    """Return sum_i w_i D_i, exactly (naive LoRA summation, arXiv:2508.11985).

    Factors of products are put side by side.
    """
    return total(changes, weights)


def magnitude_prune(
    changes: Sequence[Change], weights: Sequence[float], key: str = "", density: float = 0.2
) -> Change:
    """Return sum_i w_i trim(D_i), where trim keeps the largest entries.

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        density: fraction of the entries of each change that stays, in (0, 1].
    """
    _in_range("density", density, 0, 1)
    return _weighted_sum([_trim(change.dense(), density) for change in changes], weights)


def ties(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    density: float = 0.2,
    scale: float = 1.0,
    elect: Literal["total", "frequency"] = "total",
    normalize: Literal["count", "weights"] = "count",
) -> Change:
    """TIES (arXiv:2306.01708): trim, elect a sign for each entry, average the entries that agree.

    With weights of 1 the result is a mean, not a sum. For two changes that share no entry it equals
    the sum, and for two equal changes it equals one of them.

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        density: fraction of the entries of each change that stays, in (0, 1].
        scale: lambda, a factor of the result.
        elect: the sign of the weighted sum, or of most changes. The sign of zero is +.
        normalize: divide by the number of changes that agree, or by the sum of their |weights|.
    """
    _in_range("density", density, 0, 1)
    _check_votes(elect, normalize)
    trimmed = [_trim(change.dense(), density) for change in changes]
    return Dense(_elect_and_average(trimmed, weights, scale, elect, normalize))


def dare(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    drop: float = 0.5,
    seed: int = 0,
) -> Change:
    """DARE (arXiv:2311.03099): sum_i w_i M_i D_i / (1 - drop), with a random mask M_i.

    The mean over seeds is the sum.

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        drop: probability that an entry is dropped, in [0, 1).
        seed: seed of the masks. Each change and each layer has a mask of its own.
    """
    return _weighted_sum(_drop_entries(changes, key, drop, seed), weights)


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
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        drop: as in `dare`.
        seed: as in `dare`.
        scale: as in `ties`.
        elect: as in `ties`.
        normalize: as in `ties`.
    """
    _check_votes(elect, normalize)
    dropped = _drop_entries(changes, key, drop, seed)
    return Dense(_elect_and_average(dropped, weights, scale, elect, normalize))


def knots(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    within: Literal["ties", "dare_ties", "magnitude_prune", "dare", "sum"] = "ties",
    cut: float = 1e-9,
    **options: Any,
) -> Change:
    """KnOTS (arXiv:2410.19735): apply another operator in the basis that all changes share.

    [D_1 ... D_N] = U S [V_1 ... V_N]^T gives blocks X_i = S V_i^T. The result is U X, where X is
    the other operator's result for the blocks. With the sum, the result is the sum. Products form
    no (m, n) matrix, only the blocks, (R, n) each, where R is the sum of the ranks.

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        within: operator on the blocks.
        cut: singular values below this fraction of the largest are dropped. (The released code
            drops those below 1e-5 absolute.)
        options: of that operator.
    """
    _one_of("within", within, tuple(name for name in OPERATORS if name != "knots"))
    U, S, blocks = _shared_basis(changes)
    kept = cut * S[0] < S if len(S) else S.new_zeros(0, dtype=torch.bool)
    U, S = U[:, kept], S[kept]
    if not len(S):
        return total(changes, weights)
    X = [Dense(S[:, None] * block[kept]) for block in blocks]
    merged = OPERATORS[within](X, weights, key, **options)
    like = changes[0].like
    return Product(U.to(like), merged.dense().to(like))


OPERATORS: Mapping[str, Operator] = {
    "sum": add,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
    "knots": knots,
}
"""Operators by name."""


def options_of(operator: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options of an operator.

    Raises:
        ValueError: for an option that the operator does not have.
    """
    known = _option_names(operator)
    if operator == "knots":
        within = values.get("within", "ties")
        known = ["within", "cut", *(_option_names(within) if within in OPERATORS else [])]
    for name in values:
        if name not in known:
            raise UserError(
                f"{operator} has no option {name!r}; it has {', '.join(known) or 'none'}."
            )
    return dict(values)


def _option_names(operator: str) -> list[str]:
    """Return the names of an operator's arguments after changes, weights and key."""
    return list(inspect.signature(OPERATORS[operator]).parameters)[3:]


def _weighted_sum(matrices: Sequence[Tensor], weights: Sequence[float]) -> Dense:
    result = torch.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        result.add_(matrix, alpha=weight)
    return Dense(result)


def _trim(D: Tensor, density: float) -> Tensor:
    """Zero all but the ceil(density * size) largest entries by |value|.

    Of equal entries the one with the lower index stays.
    """
    count = math.ceil(density * D.numel())
    if count >= D.numel():
        return D
    order = D.abs().flatten().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(D.numel(), dtype=torch.bool, device=D.device)
    mask[order] = True
    return D * mask.view_as(D)


def _elect_and_average(
    matrices: Sequence[Tensor], weights: Sequence[float], scale: float, elect: str, normalize: str
) -> Tensor:
    """Elect a sign for each entry, and average the weighted entries that have it."""
    stacked = torch.stack([weight * D for D, weight in zip(matrices, weights, strict=True)])
    votes = stacked if elect == "total" else stacked.sign()
    sign = torch.where(votes.sum(0) < 0, -1.0, 1.0).to(stacked)
    agree = (stacked.sign() == sign) & (stacked != 0)
    counted = agree.to(stacked)
    if normalize == "weights":
        sizes = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).abs()
        counted = counted * sizes.view(-1, 1, 1)
    # An entry that no change has is zero, whatever it is divided by.
    divisor = counted.sum(0).clamp_min(torch.finfo(stacked.dtype).tiny)
    averaged: Tensor = scale * (stacked * agree).sum(0) / divisor
    return averaged


def _drop_entries(changes: Sequence[Change], key: str, drop: float, seed: int) -> list[Tensor]:
    """Zero random entries of each change, and scale the others by 1 / (1 - drop)."""
    _in_range("drop", 1 - drop, 0, 1, f"drop={drop}: a probability of at least 0 and below 1.")
    dropped = []
    for position, change in enumerate(changes):
        D = change.dense()
        digest = hashlib.blake2b(f"{seed}/{position}/{key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        kept = torch.rand(D.shape, generator=generator).to(D.device) >= drop
        dropped.append(D * kept / (1 - drop))
    return dropped


def _shared_basis(changes: Sequence[Change]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Decompose [D_1 | D_2 | ...] = U S [V_1^T | V_2^T | ...] in float64.

    Returns:
        U (m, R), S (R,), and V_i^T (R, n) of each change.
    """
    products = [change for change in changes if isinstance(change, Product)]
    if len(products) == len(changes):
        return _shared_basis_of_products(products)
    matrices = [change.dense().double() for change in changes]
    U, S, Vh = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
    return U, S, list(Vh.split([D.shape[1] for D in matrices], 1))


def _shared_basis_of_products(
    products: Sequence[Product],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Decompose products through the (R, R) core that is left of QR of all factors."""
    Q, R = torch.linalg.qr(torch.cat([product.U.double() for product in products], 1))
    bases, cores = [], []
    for product in products:
        basis, core = torch.linalg.qr(product.V.double().T)
        bases.append(basis)
        cores.append(core.T)
    block: Tensor = torch.block_diag(*cores)  # type: ignore[no-untyped-call]
    u, S, vh = torch.linalg.svd(R @ block, full_matrices=False)
    parts = vh.split([basis.shape[1] for basis in bases], 1)
    return Q @ u, S, [part @ basis.T for part, basis in zip(parts, bases, strict=True)]


def _check_votes(elect: str, normalize: str) -> None:
    _one_of("elect", elect, ("total", "frequency"))
    _one_of("normalize", normalize, ("count", "weights"))


def _in_range(name: str, value: float, above: float, most: float, sentence: str = "") -> None:
    if not above < value <= most:
        raise UserError(sentence or f"{name}={value}: above {above}, and at most {most}.")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r}: one of {', '.join(allowed)}.")
