"""DecoupledLoRA: directions of earlier tasks, frozen, beside a pair that trains (SD-LoRA)."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank._options import POSITIVE
from adaptrank.parameterizations.capabilities import DEFAULT_CAPABILITIES, Capability
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.tensor_kinds import TensorKind

SHARED_OVER = {"shared": "all", "layer": "block", "module": "kind"}
"""Granularity of the magnitudes -> the layers that share them."""

RIDGE = 1e-6
"""Added to the diagonal of a Gram matrix of directions of length 1."""


class DecoupledLoRA(LowRankUpdate):
    """W' = W + sum_j g_j D_j + a_t s B A, with g_j = sum_{k<t} a_k C_kj: magnitudes and directions.

    The pair (B, A) of the present task t and all magnitudes a_1, ..., a_t train. The directions
    D_j = unit(B_j A_j) of earlier tasks and the coefficients C are frozen. The strategy `SDLoRA`
    turns the pair into a direction at the end of a task. C is then diagonal, and holds the length
    of each pair in each layer, so that the function stays the same. A pair that is a combination of
    earlier directions leaves its coefficients in C, and no direction. Before the first task ends
    this is a LoRA with a magnitude.

    s is fixed at construction. The magnitudes are one vector for all layers, for each transformer
    block, or for each layer. B starts at zero, so training starts at W.

    Source: SD-LoRA, arXiv:2501.13198, and its released code. The code has s = 1, rank 10 on query
        and value of a ViT-B/16, and one magnitude for each task, which starts at 0.8.
    Shapes: W (m, n), A (r, n), B (m, r), magnitudes a (t,). Frozen: A_past (R, n), B_past (m, R),
        mix (t, R). A direction is some columns of B_past with the same rows of A_past, and mix
        holds C, each number once for every column. Parameters: r (m + n) + t.
    Args:
        rank: number r of rank-1 components of the pair that trains.
        scale: s. There is no division by the rank, because the rank may change with the task.
        magnitude: start of each magnitude.
        granularity: "shared" has one magnitude of a task for all layers, "layer" one for each
            transformer block, and "module" one for each adapted layer.
        dropout: probability of dropping an input element on the way to A, in [0, 1).
    Raises:
        ValueError: if rank < 1, the granularity is unknown, or dropout is outside [0, 1).
    """

    source = "arXiv:2501.13198"
    ranges: ClassVar = {"magnitude": POSITIVE}
    accepts = layers.MATRICES
    axes = {"rank": {"A": 0, "B": 1}}
    stacks = {"tasks": {"magnitudes": 0, "mix": 0}, "past": {"A_past": 0, "B_past": 1, "mix": 1}}
    stack_floors = {"tasks": 1}
    capabilities = DEFAULT_CAPABILITIES | {Capability.MATRIX_RANK, Capability.INPUT_DIRECTIONS}
    input_factor = {"rank": "A"}
    features = {"A": (None, 1), "B": (0, None), "A_past": (None, 1), "B_past": (0, None)}
    no_decay = ("magnitudes",)
    kinds = {"magnitudes": TensorKind.MAGNITUDES}
    A_past: Tensor
    B_past: Tensor
    mix: Tensor

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 10,
        scale: float = 1.0,
        magnitude: float = 0.8,
        granularity: Literal["shared", "layer", "module"] = "shared",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if rank < 1:
            raise UserError(f"rank={rank}: a pair has at least one unit; use rank >= 1.")
        if granularity not in SHARED_OVER:
            raise UserError(
                f"granularity={granularity!r} is unknown; use one of {', '.join(SHARED_OVER)}."
            )
        self.scale, self.magnitude = scale, magnitude
        self.shared = () if granularity == "module" else ("magnitudes",)
        self.shared_over = SHARED_OVER[granularity]
        self.dropout = nn.Dropout(dropout)
        self.A = self.zeros(rank, n)
        self.B = self.zeros(m, rank)
        self.magnitudes = self.zeros(1)
        nn.init.constant_(self.magnitudes, magnitude)
        for name, shape in (("A_past", (0, n)), ("B_past", (m, 0)), ("mix", (1, 0))):
            self.register_buffer(name, self.A.detach().new_zeros(shape))
        if isinstance(self.innermost, nn.Embedding):
            # As in LoRA: the factor of the tokens starts at zero.
            self.axes = {"rank": {"B": 1, "A": 0}}
            nn.init.normal_(self.B)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @formula
    def weight(self) -> Tensor:
        W = self.base_weight
        strengths = self.magnitudes @ self.mix
        for g, b, a in zip(strengths, self.B_past.T, self.A_past, strict=True):
            W = W + g * torch.outer(b, a)
        return W + self.magnitudes[-1] * self.scale * self.gated("B") @ self.gated("A")

    def factors(self) -> tuple[Tensor, Tensor]:
        U, V, scale = self.scaled_factors()
        return scale * U, V

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        U, V = self.magnitudes[-1] * self.gated("B"), self.gated("A")
        if not len(self.A_past):
            return U, V, self.scale
        # Elementwise, because a product of so few numbers would be another kernel.
        strengths = (self.magnitudes[:, None] * self.mix).sum(0)
        U = torch.cat([self.B_past * strengths, self.scale * U], 1)
        return U, torch.cat([self.A_past, V]), 1.0

    def factor_pair(self) -> FactorPair:
        # The magnitude of the present task multiplies the product, and is no part of the pair.
        return FactorPair(B=("B", 1), A=("A", 0), scale=self.scale)

    def acts_without(self, axis: str) -> bool:
        return len(self.A_past) > 0

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw new units as the constructor does, whatever the living ones are."""
        opening = self.axis_tensors(axis)[0][0]
        if opening == "B":
            return {"B": torch.randn(self.shape[0], n, generator=generator, dtype=torch.float64)}
        drawn = torch.rand(n, self.shape[1], generator=generator, dtype=torch.float64)
        return {"A": (2 * drawn - 1) / math.sqrt(self.shape[1])}

    # ---- what the strategy does at the end of a task

    @torch.no_grad()
    def keep_direction(
        self,
        norm: Literal["product", "product_of_norms"] = "product",
        fold_norm: bool = True,
        tau: float | None = None,
    ) -> bool:
        """Turn the pair into a frozen direction of the present task. The pair stays as it is.

        The direction is B A / c, with c = ||B A||_F or c = ||B||_F ||A||_F. It gets the coefficient
        s c in C, so that its part of the function is a_t s B A as before. With a `tau` the
        direction is fitted by the earlier ones,

            min_x || D - sum_j x_j D_j ||_F,

        by the normal equations with a ridge of 1e-6. If the rest is at most tau ||D||_F, the
        coefficients x_j s c go to C and the direction is dropped. All sums are taken from the
        factors, in float64. A pair whose product is zero leaves nothing.

        Args:
            norm: "product" or "product_of_norms", which is that of the released code.
            fold_norm: whether the coefficient is s c. Else it is 1, as in the released code, and
                the function changes.
            tau: largest rest of a direction that is dropped, over its length. None drops none.
        Returns:
            Whether there is a new direction.
        """
        B, A = self.gated("B").double(), self.gated("A").double()
        squared = inner_products(B, A, B, A).sum().clamp(min=0)
        length = squared.sqrt() if norm == "product" else B.norm() * A.norm()
        if not squared > 0:
            return False
        coefficient = self.scale * length if fold_norm else length.new_ones(())
        B = B / length
        if tau is not None and len(self.A_past):
            fit, rest = self._fit(B, A)
            if rest <= tau:
                self.mix[-1] += (coefficient * fit).to(self.mix)
                return False
        of_new = self.mix.new_zeros(len(self.mix), len(A))
        of_new[-1] = coefficient.to(self.mix)
        self.mix = torch.cat([self.mix, of_new], 1)
        self.B_past = torch.cat([self.B_past, B.to(self.B_past)], 1)
        self.A_past = torch.cat([self.A_past, A.to(self.A_past)])
        return True

    def _fit(self, B: Tensor, A: Tensor) -> tuple[Tensor, float]:
        """Fit a direction by the earlier ones.

        Returns:
            Coefficient of each column of B_past, (R,), and the rest over the length of the
            direction.
        """
        B_past, A_past = self.B_past.double(), self.A_past.double()
        members = self.directions().to(A_past)  # (R, directions)
        gram = members.T @ inner_products(B_past, A_past, B_past, A_past) @ members
        with_new = members.T @ inner_products(B_past, A_past, B, A).sum(1)
        squared = inner_products(B, A, B, A).sum()
        ridged = gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        x = torch.linalg.solve(ridged, with_new)
        # One step of refinement takes out most of what the ridge leaves behind.
        x = x + torch.linalg.solve(ridged, with_new - gram @ x)
        rest = (squared - 2 * x @ with_new + x @ gram @ x).clamp(min=0)
        return members @ x, float((rest / squared).sqrt())

    def directions(self) -> Tensor:
        """Return which columns of B_past belong to which direction, (R, directions), 0 or 1.

        The columns of a direction were added together, by the first task with a coefficient for
        them.
        """
        first_task = (self.mix != 0).int().argmax(0)
        members: Tensor = first_task[:, None] == torch.arange(len(self.mix), device=self.mix.device)
        return members[:, members.any(0)]


def inner_products(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """Return <b_i a_i, b_j a_j>, (k1, k2), of the rank-1 components of two products of factors.

    Their sum is <B1 A1, B2 A2>, without a matrix of the layer's size.
    """
    return (B1.T @ B2) * (A1 @ A2.T)
