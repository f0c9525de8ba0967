"""SVD: a sum of rank-1 triplets whose middle factor weighs each of them."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank._options import NOT_NEGATIVE, POSITIVE
from adaptrank.parameterizations.capabilities import DEFAULT_CAPABILITIES, Capability
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate


class SVD(LowRankUpdate):
    """W' = W + s P diag(l) Q, with P and Q kept near orthogonal by a penalty.

    s = alpha / rank is fixed at construction. Training starts at W because l = 0. A fresh unit has
    directions orthogonal to the living ones, and l = 0.

    Source: parameterization of AdaLoRA, arXiv:2303.10512, and of ElaLoRA, arXiv:2504.00254. P and Q
        start as in their released codes. That of AdaLoRA has s = alpha / (rank + 1e-5).
    Shapes: W (m, n), P (m, r), l (r,), Q (r, n). Parameters: r (m + n + 1).
    Penalty: orth * (||P^T P - I||_F + ||Q Q^T - I||_F) / 2. As in both released codes, the norms
        are not squared. The library averages the penalty over the layers, which is the mean over
        all P and Q.
    Args:
        rank: number r of triplets.
        alpha: numerator of the scale s.
        dropout: probability of dropping an input element on the way to Q, in [0, 1).
        init_std: standard deviation of the normal start of P and Q.
        orth: weight of the penalty. 0 turns it off.
    Raises:
        ValueError: if rank is below 1 or above min(m, n).
    """

    source = "arXiv:2303.10512"
    ranges: ClassVar = {"init_std": POSITIVE, "orth": NOT_NEGATIVE}
    axes = {"rank": {"P": 1, "Q": 0, "l": 0}}
    capabilities = DEFAULT_CAPABILITIES | {Capability.MATRIX_RANK, Capability.INPUT_DIRECTIONS}
    input_factor = {"rank": "Q"}
    no_decay = ("l",)
    kinds = {"l": TensorKind.SCALES}
    studied_rate = StudiedRate(1e-2, "docs/results/study_budgets.md")

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        init_std: float = 0.02,
        orth: float = 0.1,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if not 1 <= rank <= min(m, n):
            raise UserError(f"rank={rank} does not fit a {m}x{n} layer; use 1 to {min(m, n)}.")
        self.scale = alpha / rank
        self.orth, self.init_std = orth, init_std
        self.dropout = nn.Dropout(dropout)
        self.P = self.zeros(m, rank)
        self.Q = self.zeros(rank, n)
        self.l = self.zeros(rank)
        nn.init.normal_(self.P, std=init_std)
        nn.init.normal_(self.Q, std=init_std)

    @formula
    def weight(self) -> Tensor:
        return self.base_weight + self.scale * self.P @ torch.diag(self.gated("l")) @ self.Q

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.P * (self.scale * self.gated("l")), self.Q

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        return self.P * self.gated("l"), self.Q, self.scale

    def max_units(self, axis: str) -> int:
        # Beyond that no direction is orthogonal to the living ones.
        return min(self.shape)

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "P": _orthogonal_to(self.P.detach(), n, generator, self.init_std),
            "Q": _orthogonal_to(self.Q.detach().T, n, generator, self.init_std).T,
        }

    def penalty(self) -> Tensor | None:
        if not self.orth:
            return None
        eye = torch.eye(len(self.l), device=self.l.device, dtype=self.l.dtype)
        deviation: Tensor = (self.P.T @ self.P - eye).norm() + (self.Q @ self.Q.T - eye).norm()
        return deviation * (self.orth / 2)


def _orthogonal_to(living: Tensor, n: int, generator: torch.Generator, std: float) -> Tensor:
    """Draw n columns (d, n) orthogonal to the columns of `living` (d, r) and to each other.

    Their length is the root mean square length of the living columns, or that of the start, for
    elements of standard deviation `std`, if there are none.
    """
    columns = living.to("cpu", torch.float64)
    length = columns.square().sum(0).mean().sqrt() if columns.numel() else std * len(columns) ** 0.5
    drawn = torch.randn(len(columns), n, generator=generator, dtype=torch.float64)
    # Orthonormalizing the living columns first makes this a projection. A - Q Q^T A with a raw Q
    # would not be one.
    basis = torch.linalg.qr(torch.cat([columns, drawn], 1)).Q
    directions: Tensor = basis[:, columns.shape[1] :]
    return directions * length
