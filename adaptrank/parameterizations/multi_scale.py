"""MultiScale: a diagonal core between two planes, each of which is a product itself (LoRA²)."""

from typing import Literal

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost, Parameterization


class MultiScale(Parameterization):
    """W' = W + s B2b B2a diag(e) B1 A: LoRA² puts q core values between two products; s = alpha / rank fixed at construction.

    Training starts at W because e = 0. The rank of the change is at most the smallest of q and the widths. A core value costs
    2 k + 1 numbers and is what an allocator moves first; the widths, one on the input side and one on the output side, carry the
    bulk. The product of the three inner factors is small and computed once a call, so a token costs what it does in a LoRA
    of rank k.

    Source: arXiv:2408.06854 (abstract and released code; no table was read). The code has no separate widths, k = 8 in both, and adds 1e-5 to
    the rank in s. Its term that sets the planes against each other has no effect there, and is left out.
    Shapes: W (m, n), A (k, n), B1 (q, k), e (q,), B2a (k, q), B2b (m, k). Parameters: k (m + n) + 2 k q + q.
    Penalty: orth / 4 * sum of ||G - I||_F^2 over the four factors, G the smaller Gram matrix of each: squared, as the norm itself has no
    gradient where it is 0, which is where training starts; the smaller, as the k x k one of the code is never I when q < k.
    Args:
        rank: number q of core values.
        width: k, of both planes.
        alpha: numerator of the scale s; the authors use 16 and 32.
        dropout: probability of dropping an input element on the way to A, in [0, 1).
        init: "orthogonal" factors, where the penalty is 0, or "released", N(0, 0.02^2).
        orth: weight of the penalty, 0.1 to 0.3 in the code; 0 turns it off.
    Raises:
        ValueError: if rank < 1, or width is below 1 or above min(m, n).
    """

    source = "arXiv:2408.06854"
    accepts = layers.MATRICES
    axes = {
        "core": {"B1": 0, "B2a": 1, "e": 0},
        "input": {"A": 0, "B1": 1},
        "output": {"B2a": 0, "B2b": 1},
    }
    no_decay = ("e",)

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        width: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        init: Literal["orthogonal", "released"] = "orthogonal",
        orth: float = 0.1,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if rank < 1:
            raise UserError(f"rank={rank}: MultiScale has at least one core value; use rank >= 1.")
        if not 1 <= width <= min(m, n):
            raise UserError(f"width={width} does not fit a {m}x{n} layer; use 1 to {min(m, n)}.")
        self.scale = alpha / rank
        self.orth = orth
        self.dropout = nn.Dropout(dropout)
        self.A = self.zeros(width, n)
        self.B1 = self.zeros(rank, width)
        self.e = self.zeros(rank)
        self.B2a = self.zeros(width, rank)
        self.B2b = self.zeros(m, width)
        for factor in self._factors():
            if init == "orthogonal":
                nn.init.orthogonal_(factor)
            else:
                nn.init.normal_(factor, std=0.02)

    def _factors(self) -> tuple[Tensor, ...]:
        return self.A, self.B1, self.B2a, self.B2b

    @property
    def weight(self) -> Tensor:
        return (
            self.base_weight
            + self.scale * self.B2b @ self.B2a @ torch.diag(self.e) @ self.B1 @ self.A
        )

    def product(self) -> tuple[Tensor, Tensor]:
        core = (self.scale * self.B2a * self.e) @ self.B1
        return self.B2b @ core, self.A

    def cost(self) -> Cost:
        (m, n), q, inner, outer = self.shape, len(self.e), len(self.A), len(self.B2a)
        return Cost(
            flops=2 * inner * (m + n), flops_once=2 * outer * inner * (q + m), kept=n + inner
        )

    def max_units(self, axis: str) -> int | None:
        m, n = self.shape
        return {"input": n, "output": m}.get(
            axis
        )  # beyond that no row of a plane is orthogonal to the others

    def penalty(self) -> Tensor | None:
        if not self.orth:
            return None
        off = torch.stack([_off_orthogonal(factor) for factor in self._factors()]).mean()
        return self.orth * off


def _off_orthogonal(factor: Tensor) -> Tensor:
    """||G - I||_F^2 of the smaller Gram matrix G: 0 where the rows, or the columns if they are fewer, are orthonormal."""
    rows = factor if factor.shape[0] <= factor.shape[1] else factor.T
    return (
        (rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)).square().sum()
    )
