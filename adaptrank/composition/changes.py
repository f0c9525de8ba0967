"""The change of one weight, as a product of two factors or as a matrix, and the algebra of changes. Nothing is written to.

No (m, n) matrix is formed of products unless `dense()` is asked for. What is summed is summed in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Union

import torch
from torch import Tensor

from adaptrank import layers as kinds
from adaptrank._errors import UserError
from adaptrank.parameterizations import Parameterization

Change = Union["Product", "Dense"]
"""W' - W of one layer, (m, n)."""


@dataclass(frozen=True)
class Spectrum:
    """A thin singular value decomposition: U (m, k), S (k,) from the largest, Vh (k, n), float64."""

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True)
class Product:
    """U V, with U (m, k) and V (k, n); every scale is in the factors."""

    U: Tensor
    V: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.U.shape[0], self.V.shape[1]

    @property
    def rank(self) -> int:
        """k, the bound on the rank that the form gives."""
        return self.U.shape[1]

    def dense(self) -> Tensor:
        """The matrix (m, n)."""
        return self.U @ self.V

    def scaled(self, weight: float) -> "Product":
        """The change times a number, sign included, split evenly over the factors."""
        root = math.sqrt(abs(weight))
        return Product(self.U * math.copysign(root, weight), self.V * root)

    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(max(0.0, inner(self, self)))

    @cached_property
    def spectrum(self) -> Spectrum:
        """From QR of both factors and a decomposition of their (k, k) core: as exact as that of the matrix."""
        Q, R = torch.linalg.qr(self.U.double())
        P, L = torch.linalg.qr(self.V.double().T)
        u, S, vh = torch.linalg.svd(R @ L.T, full_matrices=False)
        return _signed(Q @ u, S, vh @ P.T)


@dataclass(frozen=True)
class Dense:
    """A matrix D (m, n), where no product is known."""

    D: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.D.shape[0], self.D.shape[1]

    @property
    def rank(self) -> int:
        """min(m, n)."""
        return min(self.shape)

    def dense(self) -> Tensor:
        """The matrix."""
        return self.D

    def scaled(self, weight: float) -> "Dense":
        """The change times a number."""
        return Dense(weight * self.D)

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.D.double().norm())

    @cached_property
    def spectrum(self) -> Spectrum:
        """Its singular value decomposition."""
        return _signed(*torch.linalg.svd(self.D.double(), full_matrices=False))


@torch.no_grad()
def change_of(layer: Parameterization) -> Change:
    """W' - W (m, n) of a nest, as far as it is switched on: a product where it has one, in the adapter's dtype."""
    factors = layer.low_rank()
    if factors is not None:
        return Product(*factors)
    return Dense(layer.dense() - kinds.dense(layer.innermost, layer.adapter_dtype))


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> Spectrum:
    """Singular vectors have no sign of their own: the largest entry of each left one is positive."""
    if not len(S):
        return Spectrum(U, S, Vh)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return Spectrum(U * sign, S, Vh * sign.T)


def inner(a: Change, b: Change) -> float:
    """<A, B> = sum_ij A_ij B_ij; of two products sum((U_a^T U_b) * (V_a V_b^T))."""
    if isinstance(a, Product) and isinstance(b, Product):
        return float(((a.U.double().T @ b.U.double()) * (a.V.double() @ b.V.double().T)).sum())
    if isinstance(a, Product):
        return float(((a.U.double().T @ b.dense().double()) * a.V.double()).sum())
    return inner(b, a) if isinstance(b, Product) else float((a.D.double() * b.D.double()).sum())


def total(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """sum_i w_i D_i, exact: of products the factors side by side, of rank k_1 + k_2 + ..."""
    weighted = [
        change.scaled(w) if w != 1 else change for change, w in zip(changes, weights, strict=True)
    ]
    if all(isinstance(change, Product) for change in weighted):
        products = [change for change in weighted if isinstance(change, Product)]
        return Product(torch.cat([p.U for p in products], 1), torch.cat([p.V for p in products]))
    result = weighted[0].dense().clone()
    for change in weighted[1:]:
        result += change.dense()
    return Dense(result)


def truncated(change: Change, rank: int) -> Product:
    """The best approximation of this rank in Frobenius norm, singular values shared evenly by the factors.

    Its error is the norm of the singular values left out.
    """
    s = change.spectrum
    root = s.S[:rank].sqrt()
    like = change.U if isinstance(change, Product) else change.D
    return Product((s.U[:, :rank] * root).to(like), (root[:, None] * s.Vh[:rank]).to(like))


def rank_for(change: Change, energy: float | None = None, error: float | None = None) -> int:
    """The least rank that keeps a fraction of the sum of squares, or whose relative error is at most this one; at least 1."""
    squares = change.spectrum.S.square()
    whole = float(squares.sum())
    if whole == 0:
        return 1
    left = (whole - squares.cumsum(0)).clamp_min(0) / whole  # of rank 1, 2, ...
    allowed = 1 - energy if energy is not None else (error or 0.0) ** 2
    enough = (left <= allowed + 1e-15).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(squares)


def shared_ranks(changes: Sequence[Change], budget: int) -> list[int]:
    """Ranks that spend at most `budget` parameters, k (m + n) a layer, on the directions with most energy per parameter.

    At least one a layer.

    Raises:
        ValueError: if one for each layer is more than the budget.
    """
    ranks = [1] * len(changes)
    spent = sum(sum(change.shape) for change in changes)
    if spent > budget:
        raise UserError(
            f"A budget of {budget:,} parameters is below {spent:,}, one direction for each of {len(changes)} layers."
        )
    rest = sorted(
        (
            (-(float(s) ** 2) / sum(c.shape), i, k)
            for i, c in enumerate(changes)
            for k, s in enumerate(c.spectrum.S)
            if k
        ),
    )
    stopped: set[int] = set()
    for value, i, k in rest:
        price = sum(changes[i].shape)
        if value == 0 or i in stopped or spent + price > budget:
            stopped.add(i)  # a later direction of the layer must not come without this one
            continue
        ranks[i], spent = k + 1, spent + price
    return ranks
