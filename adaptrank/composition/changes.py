"""The change of one weight, as a product of two factors or as a matrix, and the algebra of changes.

Functions here never write to a change. Products form no (m, n) matrix unless `dense()` is called.
Sums are accumulated in float64.
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
"""D = W' - W of one layer, (m, n)."""


@dataclass(frozen=True)
class Spectrum:
    """Thin singular value decomposition in float64.

    Args:
        U: left singular vectors, (m, k).
        S: singular values, (k,), in descending order.
        Vh: right singular vectors, (k, n).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True)
class Product:
    """D = U V, with every scale in the factors.

    Args:
        U: (m, k).
        V: (k, n).
    """

    U: Tensor
    V: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.U.shape[0], self.V.shape[1]

    @property
    def rank(self) -> int:
        """Upper bound of the rank: k."""
        return self.U.shape[1]

    @property
    def like(self) -> Tensor:
        """A tensor of the change's dtype and device."""
        return self.U

    def dense(self) -> Tensor:
        """Return the matrix (m, n)."""
        return self.U @ self.V

    def scaled(self, weight: float) -> "Product":
        """Return the change times a number. Its root goes into each factor, and its sign into U."""
        root = math.sqrt(abs(weight))
        return Product(self.U * math.copysign(root, weight), self.V * root)

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return math.sqrt(max(0.0, inner(self, self)))

    @cached_property
    def spectrum(self) -> Spectrum:
        """Singular value decomposition, from QR of both factors and of their (k, k) core.

        It is as exact as a decomposition of the matrix.
        """
        Q, R = torch.linalg.qr(self.U.double())
        P, L = torch.linalg.qr(self.V.double().T)
        u, S, vh = torch.linalg.svd(R @ L.T, full_matrices=False)
        return with_fixed_signs(Q @ u, S, vh @ P.T)


@dataclass(frozen=True)
class Dense:
    """A change as a matrix, where no product is known.

    Args:
        D: (m, n).
    """

    D: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.D.shape[0], self.D.shape[1]

    @property
    def rank(self) -> int:
        """Upper bound of the rank: min(m, n)."""
        return min(self.shape)

    @property
    def like(self) -> Tensor:
        """A tensor of the change's dtype and device."""
        return self.D

    def dense(self) -> Tensor:
        """Return the matrix."""
        return self.D

    def scaled(self, weight: float) -> "Dense":
        """Return the change times a number."""
        return Dense(weight * self.D)

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(self.D.double().norm())

    @cached_property
    def spectrum(self) -> Spectrum:
        """Singular value decomposition of the matrix."""
        return with_fixed_signs(*torch.linalg.svd(self.D.double(), full_matrices=False))


def with_fixed_signs(U: Tensor, S: Tensor, Vh: Tensor) -> Spectrum:
    """Flip pairs of singular vectors so that the largest entry of each left one is positive."""
    if not len(S):
        return Spectrum(U, S, Vh)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return Spectrum(U * sign, S, Vh * sign.T)


@torch.no_grad()
def change_of(layer: Parameterization) -> Change:
    """Return W' - W (m, n) of the enabled wrappers of a nest, in the adapter's dtype.

    It is a product where the nest has one.
    """
    factors = layer.low_rank()
    if factors is not None:
        return Product(*factors)
    return Dense(layer.dense() - kinds.dense(layer.innermost, layer.adapter_dtype))


def inner(a: Change, b: Change) -> float:
    """Return <A, B> = sum_ij A_ij B_ij.

    For two products this is sum((U_a^T U_b) * (V_a V_b^T)).
    """
    if isinstance(a, Product) and isinstance(b, Product):
        return float(((a.U.double().T @ b.U.double()) * (a.V.double() @ b.V.double().T)).sum())
    if isinstance(a, Product):
        return float(((a.U.double().T @ b.dense().double()) * a.V.double()).sum())
    if isinstance(b, Product):
        return inner(b, a)
    return float((a.D.double() * b.D.double()).sum())


def total(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """Return sum_i w_i D_i, exactly.

    Products are put side by side: the sum is a product of rank k_1 + k_2 + ...
    """
    weighted = []
    for change, weight in zip(changes, weights, strict=True):
        weighted.append(change.scaled(weight) if weight != 1 else change)
    products = [change for change in weighted if isinstance(change, Product)]
    if len(products) == len(weighted):
        return Product(torch.cat([p.U for p in products], 1), torch.cat([p.V for p in products]))
    result = weighted[0].dense().clone()
    for change in weighted[1:]:
        result += change.dense()
    return Dense(result)


def truncated(change: Change, rank: int) -> Product:
    """Return the best approximation of a rank in Frobenius norm.

    Its error is the norm of the singular values that are left out. The root of each singular value
    goes into each factor.
    """
    spectrum = change.spectrum
    root = spectrum.S[:rank].sqrt()
    U, V = spectrum.U[:, :rank] * root, root[:, None] * spectrum.Vh[:rank]
    return Product(U.to(change.like), V.to(change.like))


def rank_for(change: Change, energy: float | None = None, error: float | None = None) -> int:
    """Return the least rank, at least 1, that approximates a change well enough.

    Args:
        change: (m, n).
        energy: fraction of the sum of squared singular values to keep.
        error: relative error to allow, if there is no `energy`.
    """
    squares = change.spectrum.S.square()
    total_energy = float(squares.sum())
    if total_energy == 0:
        return 1
    # Relative squared errors of rank 1, 2, ...
    errors = (total_energy - squares.cumsum(0)).clamp_min(0) / total_energy
    allowed = 1 - energy if energy is not None else (error or 0.0) ** 2
    sufficient = (errors <= allowed + 1e-15).nonzero()
    return int(sufficient[0]) + 1 if len(sufficient) else len(squares)


def shared_ranks(changes: Sequence[Change], budget: int) -> list[int]:
    """Return a rank for each layer, so that all layers together keep most energy.

    Rank k of a layer costs k (m + n) parameters. Each layer gets rank 1 at least, unless its change
    has rank 0. Then the directions with most energy per parameter come first.

    Args:
        changes: one of each layer.
        budget: most parameters of all layers together.
    Raises:
        ValueError: if rank 1 of each layer is more than the budget.
    """
    prices = [sum(change.shape) for change in changes]
    ranks = [min(1, change.rank) for change in changes]
    spent = sum(rank * price for rank, price in zip(ranks, prices, strict=True))
    if spent > budget:
        raise UserError(
            f"A budget of {budget:,} parameters is below {spent:,}, "
            f"one direction for each of {sum(ranks)} layers."
        )
    directions = []
    for layer, change in enumerate(changes):
        for k, singular_value in enumerate(change.spectrum.S):
            if k > 0:
                directions.append((-(float(singular_value) ** 2) / prices[layer], layer, k))

    finished: set[int] = set()
    for negative_value, layer, k in sorted(directions):
        price = prices[layer]
        if negative_value == 0 or layer in finished or spent + price > budget:
            # Without this direction, no later direction of the layer may come.
            finished.add(layer)
            continue
        ranks[layer] = k + 1
        spent += price
    return ranks
