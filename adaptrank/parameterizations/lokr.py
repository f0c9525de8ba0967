"""LoKr: a Kronecker product whose large factor is of low rank."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.ops import kronecker_product
from adaptrank.ops import low_rank as ops
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.kronecker import divisor
from adaptrank.parameterizations.traits import StudiedRate


class LoKr(Parameterization):
    """W' = W + s A kron (B1 B2), with s = alpha / rank fixed at construction.

    A may be a product A1 A2 as well. The rank is that of B. The change can have up to rank(A) times
    that rank. An input as a matrix X goes through B2, A and B1. All of these products are thin, and
    neither B nor the Kronecker product is formed. One factor starts at zero, so training starts at
    W.

    Source: KronA, arXiv:2212.10650, with the factors of LoKr in LyCORIS and HF PEFT. The defaults
        of HF PEFT are rank 8 and alpha 8, so s is 1, as here. Those of LyCORIS are 4 and 1. Both
        leave B undivided from rank >= max(m2, n2) / 2 on. Here B is a product for every rank, and a
        rank of 8 would not fit small layers. With factor=-1 the sizes m1 and n1 are those of HF
        PEFT for every size. A positive factor that does not divide a size is passed by there, once
        it lies above the square root of the size. So the pairs differ for 64 of the sizes up to 128
        with some factor up to 16, and for no size above 210 with those factors. Files keep the
        meaning of their factor, and adapters of HF PEFT come with both sizes, factor=[m1, n1].
    Shapes: W (m, n), A (m1, n1), B1 (m2, r), B2 (r, n2), with m = m1 m2 and n = n1 n2. Decomposed,
        A1 (m1, r), A2 (r, n1) with r as at construction. Parameters: m1 n1 + r (m2 + n2), or
        r (m1 + n1) + r (m2 + n2).
    Args:
        rank: number r of units of B.
        alpha: numerator of the scale s.
        factor: m1 and n1 are the largest divisors up to it. -1 makes m1 <= m2 and n1 <= n2 as equal
            as possible. A list [m1, n1] states both.
        decompose_both: A = A1 A2 if rank < max(m1, n1) / 2.
        zero: factor that starts at zero: "A" as in HF PEFT (A1 if A is decomposed), or "B" as in
            LyCORIS. For "B" it is B1, which closes a unit. LyCORIS has B2 start at zero.
        dropout: probability of dropping an input element on the way to B2, in [0, 1).
    Raises:
        ValueError: if rank is below 1 or above min(m2, n2), factor is neither -1 nor positive, or
            its numbers do not divide m and n.
    """

    source = "arXiv:2212.10650"
    axes = {"rank": {"B2": 0, "B1": 1}}
    studied_rate = StudiedRate(1e-2, "docs/results/study_methods_at_defaults.md")
    reads_blocks = True

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 4,
        alpha: float = 4.0,
        factor: int | list[int] = -1,
        decompose_both: bool = False,
        zero: Literal["A", "B"] = "A",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        m1, n1 = _coarse_shape(m, n, factor)
        self.largest_rank = min(m // m1, n // n1)
        if not 1 <= rank <= self.largest_rank:
            raise UserError(
                f"rank={rank} does not fit B of {m // m1}x{n // n1} ({m}x{n} with "
                f"factor={factor}); use 1 to {self.largest_rank}."
            )
        if zero not in ("A", "B"):
            raise UserError(f"zero={zero!r} is no factor; use 'A' or 'B'.")
        self.scale, self.factor, self.decompose_both = alpha / rank, factor, decompose_both
        self.dropout = nn.Dropout(dropout)
        self.decomposed = decompose_both and 2 * rank < max(m1, n1)
        if self.decomposed:
            self.A1, self.A2 = self.zeros(m1, rank), self.zeros(rank, n1)
        else:
            self.A = self.zeros(m1, n1)
        self.B1, self.B2 = self.zeros(m // m1, rank), self.zeros(rank, n // n1)
        kept_zero = ("A1" if self.decomposed else "A") if zero == "A" else "B1"
        for name, parameter in self.own_parameters():
            if name != kept_zero:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    @property
    def coarse(self) -> Tensor:
        """A (m1, n1)."""
        return self.A1 @ self.A2 if self.decomposed else self.A

    @formula
    def weight(self) -> Tensor:
        B = self.gated("B1") @ self.B2
        return self.base_weight + self.scale * torch.kron(self.coarse.contiguous(), B)

    def forward_adapted(self, x: Tensor) -> Tensor:
        if not self.fuses(x):
            return super().forward_adapted(x)
        inputs = self.apply_dropout(x)
        frozen = ops.plain(self.base, x.dtype) if inputs is x else None
        if frozen is not None:
            factors = self.coarse, self.gated("B1"), self.B2
            return kronecker_product.linear(x, *frozen, *factors, self.scale)
        A, B2 = self.coarse.to(x.dtype), self.B2.to(x.dtype)
        X = inputs.reshape(*x.shape[:-1], A.shape[1], B2.shape[1])
        z = F.linear(X, B2)  # (..., n1, r)
        return self.add_low_rank(x, F.linear(z.mT, A).mT, self.gated("B1"), self.scale)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        A = self.coarse
        z = F.linear(self.dropout(x).unflatten(-1, (A.shape[1], -1)), self.B2)  # (..., n1, r)
        z = torch.einsum("...ur,pu->...pr", z, A)
        return self.scale * F.linear(z, self.gated("B1")).flatten(-2)

    def cost(self) -> Cost:
        (m, n), r, (m1, n1) = self.shape, len(self.B2), self.coarse.shape
        once = 2 * m1 * n1 * self.A1.shape[1] if self.decomposed else 0
        return Cost(flops=2 * r * (n + m1 * n1 + m), flops_once=once, kept=n + r * (n1 + m1))

    def max_units(self, axis: str) -> int:
        return self.largest_rank


def _coarse_shape(m: int, n: int, factor: int | list[int]) -> tuple[int, int]:
    """Return (m1, n1), the shape of A."""
    if isinstance(factor, int):
        return divisor(m, factor), divisor(n, factor)
    if len(factor) != 2 or min(factor) < 1 or m % factor[0] or n % factor[1]:
        raise UserError(
            f"factor={factor}: give one number, or two that divide {m} and {n}, the layer's "
            f"outputs and inputs."
        )
    return factor[0], factor[1]
