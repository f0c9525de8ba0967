"""LoRA: a low-rank product beside a frozen weight."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.capabilities import DEFAULT_CAPABILITIES, Capability
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.traits import StudiedRate

AXES_OF_EMBEDDING: dict[str, Mapping[str, int | tuple[int, ...]]] = {"rank": {"B": 1, "A": 0}}
"""Axes over an embedding, whose factor A starts at zero and so closes a unit."""


class LoRA(LowRankUpdate):
    """W' = W + s B A, with s = alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    s is fixed at construction. When an allocator changes the rank, surviving units keep their
    scale. B starts at zero, so training starts at W. Of an embedding A starts at zero, and B is
    drawn from N(0, 1), as in HF PEFT. With n tokens, A from U(-1/sqrt(n), 1/sqrt(n)) would be so
    small that the first step of Adam moves hardly anything: measured, 326 times less at n = 32,000.

    Source: LoRA, arXiv:2106.09685, and rsLoRA, arXiv:2312.03732.
    Shapes: W (m, n), A (r, n), B (m, r). Parameters: r (m + n).
    Args:
        rank: number r of rank-1 components.
        alpha: numerator of the scale s.
        dropout: probability of dropping an input element on the way to A, in [0, 1).
        rslora: divide alpha by sqrt(rank) rather than by rank.
        init: start of A. "kaiming" is U(-1/sqrt(n), 1/sqrt(n)) as in the authors' code, "gaussian"
            is N(0, 1/r^2), and "orthogonal" has orthonormal rows. For an embedding the first two
            are N(0, 1) for B, and "orthogonal" gives B orthonormal columns.
    Raises:
        ValueError: if rank < 1, dropout is outside [0, 1), or an orthogonal factor would need more
            units than it has room for.
    """

    source = "arXiv:2106.09685"
    accepts = layers.MATRICES
    axes = {"rank": {"A": 0, "B": 1}}
    studied_rate = StudiedRate(1e-3, "docs/results/study_hyperadapt_trec.md")
    capabilities = DEFAULT_CAPABILITIES | {
        Capability.MATRIX_RANK,
        Capability.INPUT_DIRECTIONS,
        Capability.GRADIENT_INIT,
        Capability.WEIGHT_GRADIENT,
    }
    input_factor = {"rank": "A"}
    features = {"A": (None, 1), "B": (0, None)}

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
        init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming",
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if rank < 1:
            raise UserError(f"rank={rank}: a LoRA has at least one unit; use rank >= 1.")
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)
        self.A = self.zeros(rank, n)
        self.B = self.zeros(m, rank)
        of_embedding = isinstance(self.innermost, nn.Embedding)
        if of_embedding:
            self.axes = AXES_OF_EMBEDDING
        if init == "orthogonal":
            self._draw_orthogonal(of_embedding)
        elif of_embedding:
            nn.init.normal_(self.B)
        elif init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=1 / rank)

    def _draw_orthogonal(self, of_embedding: bool) -> None:
        (m, n), rank = self.shape, len(self.A)
        room, words = (m, "outputs") if of_embedding else (n, "inputs")
        if rank > room:
            raise UserError(
                f"init='orthogonal' needs rank <= {room}, the layer's {words}; got rank={rank}."
            )
        nn.init.orthogonal_(self.B if of_embedding else self.A)

    @formula
    def weight(self) -> Tensor:
        return self.base_weight + self.scale * self.gated("B") @ self.gated("A")

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.gated("B"), self.gated("A")

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        return self.gated("B"), self.gated("A"), self.scale

    def factor_pair(self) -> FactorPair:
        return FactorPair(B=("B", 1), A=("A", 0), scale=self.scale)

    def weight_gradient(self) -> Tensor:
        """Return gB A + B gA - gB gA, with gA and gB the gradients of A and B.

        This is the change of B A by a step of size one (arXiv:2305.18403), up to its sign and
        without s.
        """
        gA, gB = (torch.zeros_like(p) if p.grad is None else p.grad for p in (self.A, self.B))
        return gB @ self.A + self.B @ gA - gB @ gA
