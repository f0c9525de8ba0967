"""The SVD form: a sum of rank-one triplets whose middle factor says how much each counts."""

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost, Parameterization


class SVD(Parameterization):
    """W' = W + s P diag(l) Q, with s = alpha / rank fixed at construction; P and Q kept near orthogonal by a penalty.

    Training starts at W because l = 0. A fresh unit has directions orthogonal to the living ones, and l = 0.

    Source: the parameterization of AdaLoRA, arXiv:2303.10512, and of ElaLoRA, arXiv:2504.00254; P and Q start as in their released codes.
    Shapes: W (m, n), P (m, r), l (r,), Q (r, n). Parameters: r (m + n + 1).
    Penalty: orth * (||P^T P - I||_F + ||Q Q^T - I||_F) / 2 (norms not squared, as both released codes have it;
    the library averages it over the layers, which is the mean over all P and Q).
    Args:
        rank: number r of triplets.
        alpha: numerator of the scale s.
        dropout: probability of dropping an input element on the way to Q, in [0, 1).
        init_std: standard deviation of the normal start of P and Q.
        orth: weight of the penalty; 0 turns it off.
    Raises:
        ValueError: if rank is below 1 or above min(m, n).
    """

    source = "arXiv:2303.10512"
    axes = {"rank": {"P": 1, "Q": 0, "l": 0}}
    capabilities = frozenset(
        {"grow", "duplicate", "ordered", "pattern", "matrix_rank", "input_directions"}
    )
    input_factor = {"rank": "Q"}
    no_decay = ("l",)

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
        self.orth = orth
        self.dropout = nn.Dropout(dropout)
        self.P = self.zeros(m, rank)
        self.Q = self.zeros(rank, n)
        self.l = self.zeros(rank)
        nn.init.normal_(self.P, std=init_std)
        nn.init.normal_(self.Q, std=init_std)

    @property
    def weight(self) -> Tensor:
        return self.base_weight + self.scale * self.P @ torch.diag(self.l) @ self.Q

    def product(self) -> tuple[Tensor, Tensor]:
        return self.P * (self.scale * self.l), self.Q

    def cost(self) -> Cost:
        (m, n), r = self.shape, len(self.l)
        return Cost(flops=2 * r * (m + n), kept=n + r)

    def max_units(self, axis: str) -> int:
        return min(self.shape)  # beyond that no direction is orthogonal to the living ones

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "P": _beside(self.P.detach(), n, generator),
            "Q": _beside(self.Q.detach().T, n, generator).T,
        }

    def penalty(self) -> Tensor | None:
        if not self.orth:
            return None
        eye = torch.eye(len(self.l), device=self.l.device, dtype=self.l.dtype)
        off: Tensor = (self.P.T @ self.P - eye).norm() + (self.Q @ self.Q.T - eye).norm()
        return off * (self.orth / 2)


def _beside(living: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n columns (d, n) orthogonal to the columns of `living` (d, r) and to each other, of their root mean square length."""
    columns = living.to("cpu", torch.float64)
    length = columns.square().sum(0).mean().sqrt()
    drawn = torch.randn(len(columns), n, generator=generator, dtype=torch.float64)
    # Orthonormalizing the living columns first makes this a projection; A - Q Q^T A with a raw Q would not be one.
    basis = torch.linalg.qr(torch.cat([columns, drawn], 1)).Q
    directions: Tensor = basis[:, columns.shape[1] :]
    return directions * length
