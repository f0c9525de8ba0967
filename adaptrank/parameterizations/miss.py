"""MiSS: one small shard that every block of a frozen weight shares."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost, Parameterization


class MiSS(Parameterization):
    """W' = W + s D^T S, with S = [I I ... I] (p, n) a tiled identity: y += s D^T sum_t x_t over blocks x_t of p inputs.

    Of the p slots, inputs congruent modulo the period p, the axis holds the r active ones: pruning drops slots and growing
    adds unused ones, while p stays. A ragged last block (p does not divide n) is padded with zeros. D starts at zero and has a
    gradient at once, a sum over n / p blocks. For the backward pass a token keeps r numbers, the sums of its blocks.

    In variant "mini" D has q columns only, q = mini_rank, tiled over the outputs.

    In variant "bat" W'_jt = W_jt + s (W_jt D_j + D_j) for blocks W_jt (r, r) of W. It reads W, has no rank axis, and builds the
    (m, n) change at every step, in float32 or better and kept for the backward pass: about a second product with W.

    Source: MiSS, formerly DiSHA and Bone, arXiv:2409.15371; formulas as in HF PEFT, where there is no scale (s = 1) and the
        default rank is 64. "Bone" has meant both "bat" and the linear form. The paper's own tables are unread.
    Shapes: W (m, n), slots (r,), D (r, m), or (r, q) in "mini", or (m/r, r, r) in "bat". Parameters: r m, or r q in "mini".
    Args:
        rank: number r of active slots; in "bat" the side of a block.
        variant: "linear", "mini" or "bat".
        period: p, the length of a block of inputs; None is `rank`, as released. A longer one leaves room to grow.
        mini_rank: q, in "mini"; must divide m. 64 in the released recipe, 1 by default in HF PEFT.
        scale: s.
        dropout: probability of dropping an input element on the way to D, in [0, 1).
    Raises:
        ValueError: if rank or period is out of range, or a size does not divide what it tiles; it lists what does.
    """

    source = "arXiv:2409.15371"
    axes = {"rank": {"slots": 0, "D": 0}}
    capabilities = frozenset({"grow", "pattern", "matrix_rank"})
    by_product = True
    slots: Tensor

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        variant: Literal["linear", "mini", "bat"] = "linear",
        period: int | None = None,
        mini_rank: int = 8,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        self.variant, self.scale = variant, scale
        self.period = rank if period is None else period
        self.dropout = nn.Dropout(dropout)
        if variant not in ("linear", "mini", "bat"):
            raise UserError(f"variant={variant!r} is unknown; use 'linear', 'mini' or 'bat'.")
        if not 1 <= rank <= self.period <= n:
            raise UserError(
                f"rank={rank} with period={self.period} does not fit {n} inputs; use 1 <= rank <= period <= {n}."
            )
        self.blocks = -(-n // self.period)
        if variant == "bat":
            self.needs_weight()
            if self.period != rank or m % rank or n % rank:
                raise UserError(
                    f"variant='bat' has square blocks and no period: rank={rank} with period={self.period} does not "
                    f"fit {m}x{n}; leave period out and use a rank of {_divisors(m, n)}."
                )
            self.axes = {}
            self.D = self.zeros(m // rank, rank, rank)
            return
        if variant == "mini" and (mini_rank < 1 or m % mini_rank):
            raise UserError(
                f"mini_rank={mini_rank} does not divide {m} outputs; use one of {_divisors(m)}."
            )
        self.D = self.zeros(rank, mini_rank if variant == "mini" else m)
        self.register_buffer("slots", torch.arange(rank, device=layers.device(self.innermost)))

    @property
    def weight(self) -> Tensor:
        if self.variant == "bat":
            return self.base_weight + self._bat()
        m, n = self.shape
        S = torch.eye(self.period, device=self.D.device, dtype=self.D.dtype).repeat(1, self.blocks)[
            :, :n
        ]
        D = self.D.repeat(1, m // self.D.shape[1])  # once, but in "mini"
        weight: Tensor = self.base_weight + self.scale * D.T @ S[self.slots]
        return weight

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        return (
            F.linear(self.dropped(x), self._bat()) if self.variant == "bat" else super().delta(x, y)
        )

    def product(self) -> tuple[Tensor, Tensor] | None:
        """A tiled identity on the input side; "bat" has no such form."""
        if self.variant == "bat":
            return None
        m, n = self.shape
        D = self.D if self.variant == "linear" else self.D.repeat(1, m // self.D.shape[1])
        tiles = self.slots[:, None] == torch.arange(n, device=self.D.device) % self.period
        return self.scale * D.T, tiles.to(self.D.dtype)

    def _bat(self) -> Tensor:
        """s (W_jt D_j + D_j) as one matrix (m, n)."""
        (m, n), r = self.shape, self.D.shape[-1]
        W = self.base_weight.reshape(m // r, r, self.blocks, r)
        change = torch.einsum("juta,jab->jutb", W, self.D) + self.D[:, :, None]
        return self.scale * change.reshape(m, n)

    def cost(self) -> Cost:
        (m, n), r = self.shape, self.D.shape[-2]
        if self.variant == "bat":
            return Cost(flops=2 * m * n, flops_once=2 * m * n * r, kept=n)
        return Cost(flops=2 * r * (m + n), kept=r)

    def max_units(self, axis: str) -> int:
        return self.period

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        used = set(self.slots.tolist())
        unused = torch.tensor([slot for slot in range(self.period) if slot not in used])
        return {"slots": unused[torch.randperm(len(unused), generator=generator)[:n]]}


def _divisors(*sizes: int) -> list[int]:
    return [d for d in range(1, min(sizes) + 1) if not any(size % d for size in sizes)]
