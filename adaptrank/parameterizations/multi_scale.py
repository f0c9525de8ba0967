"""MultiScale: a diagonal core between two planes, each of which is a product itself (LoRA²)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank._options import NOT_NEGATIVE
from adaptrank.parameterizations.base import Cost
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate


class MultiScale(LowRankUpdate):
    """W' = W + s B2b B2a diag(e) B1 A: LoRA² puts q core values between two products.

    s = alpha / rank is fixed at construction. Training starts at W because e = 0. The rank of the
    change is at most the smallest of q and the widths. A core value costs 2 k + 1 numbers, and
    allocators move it first. The two widths, one on the input side and one on the output side, hold
    most of the parameters. The product of the three inner factors is small and computed once a
    call, so a token costs what it does in a LoRA of rank k.

    Source: arXiv:2408.06854 (abstract and released code). No table was read. The code has no
        separate widths, k = 8 in both, and adds 1e-5 to the rank in s. Its term that sets the
        planes against each other has no effect there, and is left out.
    Shapes: W (m, n), A (k, n), B1 (q, k), e (q,), B2a (k, q), B2b (m, k).
        Parameters: k (m + n) + 2 k q + q.
    Penalty: orth / 4 * sum of ||G - I||_F^2 over the four factors, with G the smaller Gram matrix
        of each. The norm is squared, because the norm itself has no gradient at 0, where training
        starts. The smaller Gram matrix is used, because the k x k one of the code is never I when
        q < k.
    Args:
        rank: number q of core values.
        width: width k of both planes.
        alpha: numerator of the scale s. The authors use 16 and 32.
        dropout: probability of dropping an input element on the way to A, in [0, 1).
        init: "orthogonal" factors, for which the penalty is 0, or "released", N(0, 0.02^2).
        orth: weight of the penalty, 0.1 to 0.3 in the code. 0 turns it off.
    Raises:
        ValueError: if rank < 1, or width is below 1 or above min(m, n).
    """

    source = "arXiv:2408.06854"
    studied_rate = StudiedRate(1e-2, "docs/results/study_methods_at_defaults.md")
    ranges: ClassVar = {"orth": NOT_NEGATIVE}
    accepts = layers.MATRICES
    axes = {
        "core": {"B1": 0, "B2a": 1, "e": 0},
        "input": {"A": 0, "B1": 1},
        "output": {"B2a": 0, "B2b": 1},
    }
    no_decay = ("e",)
    kinds = {"e": TensorKind.SCALES}

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
        for matrix in self._matrices():
            if init == "orthogonal":
                nn.init.orthogonal_(matrix)
            else:
                nn.init.normal_(matrix, std=0.02)

    def _matrices(self) -> tuple[Tensor, ...]:
        return self.A, self.B1, self.B2a, self.B2b

    @formula
    def weight(self) -> Tensor:
        B2b, core, B1 = self.gated("B2b"), torch.diag(self.gated("e")), self.gated("B1")
        return self.base_weight + self.scale * B2b @ self.B2a @ core @ B1 @ self.A

    def factors(self) -> tuple[Tensor, Tensor]:
        U, V, scale = self.scaled_factors()
        return scale * U, V

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        core = (self.B2a * self.gated("e")) @ self.gated("B1")
        return self.gated("B2b") @ core, self.A, self.scale

    def cost(self) -> Cost:
        (m, n), q, inner, outer = self.shape, len(self.e), len(self.A), len(self.B2a)
        once = 2 * outer * inner * (q + m)
        return Cost(flops=2 * inner * (m + n), flops_once=once, kept=n + inner)

    def max_units(self, axis: str) -> int | None:
        m, n = self.shape
        # Beyond that no row of a plane is orthogonal to the others.
        return {"input": n, "output": m}.get(axis)

    def penalty(self) -> Tensor | None:
        if not self.orth:
            return None
        deviations = [_squared_deviation(matrix) for matrix in self._matrices()]
        return self.orth * torch.stack(deviations).mean()


def _squared_deviation(matrix: Tensor) -> Tensor:
    """Return ||G - I||_F^2 for the smaller Gram matrix G of a matrix.

    It is 0 if the rows, or the columns if they are fewer, are orthonormal.
    """
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    eye = torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
    return (rows @ rows.T - eye).square().sum()
