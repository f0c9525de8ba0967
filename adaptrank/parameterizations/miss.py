"""MiSS: one small shard that every block of a frozen weight shares."""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank._options import COUNT
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.capabilities import Capability
from adaptrank.parameterizations.derived import Derived
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.traits import StudiedRate


class MiSS(LowRankUpdate):
    """W' = W + s D^T S, with S = [I I ... I] (p, n) a tiled identity.

    The change is y += s D^T sum_t x_t over blocks x_t of p inputs. Inputs that are congruent modulo
    the period p share a slot. The axis holds the r active slots of p: pruning drops slots and
    growing adds unused ones, while p stays. A ragged last block (p does not divide n) is padded
    with zeros. D starts at zero and has a gradient at once, a sum over n / p blocks. For the
    backward pass a token keeps r numbers, the sums of its blocks.

    In variant "mini" D has q columns only, q = mini_rank, tiled over the outputs.

    In variant "bat" W'_jt = W_jt + s (W_jt D_j + D_j) for blocks W_jt (r, r) of W. It reads W and
    has no rank axis. It builds the (m, n) change at every step, in float32 or better, and keeps it
    for the backward pass: about a second product with W.

    Source: MiSS, formerly DiSHA and Bone, arXiv:2409.15371. Formulas are as in HF PEFT, where there
        is no scale (s = 1) and the default rank is 64. "Bone" has meant both "bat" and the linear
        form. The paper's own tables are unread.
    Shapes: W (m, n), slots (r,), D (r, m), or (r, q) in "mini", or (m/r, r, r) in "bat".
        Parameters: r m, or r q in "mini".
    Args:
        rank: number r of active slots. In "bat" the side of a block.
        variant: "linear", "mini" or "bat".
        period: p, the length of a block of inputs. None is `rank`, as released. A longer one leaves
            room to grow.
        mini_rank: q, in "mini". It must divide m. 64 in the released recipe, 1 by default in HF
            PEFT.
        scale: s.
        dropout: probability of dropping an input element on the way to D, in [0, 1).
    Raises:
        ValueError: if rank or period is out of range, or a size does not divide what it tiles. The
            message lists the sizes that do.
    """

    source = "arXiv:2409.15371"
    studied_rate = StudiedRate(4e-4, "docs/results/study_methods_at_defaults.md")
    ranges: ClassVar = {"period": COUNT, "mini_rank": COUNT}
    axes = {"rank": {"slots": 0, "D": 0}}
    capabilities = frozenset({Capability.GROW, Capability.PATTERN, Capability.MATRIX_RANK})
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
        self._tiles = Derived()
        self.period = rank if period is None else period
        self.dropout = nn.Dropout(dropout)
        if variant not in ("linear", "mini", "bat"):
            raise UserError(f"variant={variant!r} is unknown; use 'linear', 'mini' or 'bat'.")
        if not 1 <= rank <= self.period <= n:
            raise UserError(
                f"rank={rank} with period={self.period} does not fit {n} inputs; use "
                f"1 <= rank <= period <= {n}."
            )
        self.blocks = -(-n // self.period)
        if variant == "bat":
            self.require_weight()
            if self.period != rank or m % rank or n % rank:
                raise UserError(
                    f"variant='bat' has square blocks and no period: rank={rank} with "
                    f"period={self.period} does not fit {m}x{n}; leave period out and use a rank "
                    f"of {_divisors(m, n)}."
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

    def refresh(self) -> None:
        self._tiles.forget()

    @property
    def tiles(self) -> Tensor:
        """S of the active slots, (r, n), in the dtype of the layer."""

        def compute() -> Tensor:
            places = torch.arange(self.shape[1], device=self.slots.device) % self.period
            return self.slots[:, None] == places

        return self._tiles.of(self.slots, layers.dtype(self.innermost), compute)

    @formula
    def weight(self) -> Tensor:
        if self.variant == "bat":
            return self.base_weight + self._bat_change()
        m, n = self.shape
        eye = torch.eye(self.period, device=self.D.device, dtype=self.D.dtype)
        S = eye.repeat(1, self.blocks)[:, :n]
        # D is repeated in "mini" only.
        D = self.gated("D").repeat(1, m // self.D.shape[1])
        weight: Tensor = self.base_weight + self.scale * D.T @ S[self.slots]
        return weight

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return D and a tiled identity. "bat" has no such form."""
        factors = self.scaled_factors()
        if factors is None:
            return None
        U, V, s = factors
        return s * U, V.to(U.dtype)

    def scaled_factors(self) -> tuple[Tensor, Tensor, float] | None:
        if self.variant == "bat":
            return None
        D = self.gated("D")
        if self.variant == "mini":
            D = D.repeat(1, self.shape[0] // D.shape[1])
        return D.T, self.tiles, self.scale

    def factor_pair(self) -> FactorPair | None:
        if self.variant != "linear":
            return None
        return FactorPair(B=("D", 0), A=("tiles", 0), scale=self.scale)

    def fuses(self, x: Tensor) -> bool:
        """Return whether products with x are fused: "bat" has no thin product."""
        return self.variant != "bat" and Parameterization.fuses(self, x)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        if self.variant == "bat":
            return F.linear(self.apply_dropout(x), self._bat_change())
        return super().delta(x, y)

    def _bat_change(self) -> Tensor:
        """Return s (W_jt D_j + D_j) of all blocks as one matrix (m, n)."""
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

    def index_ranges(self) -> dict[str, range]:
        return {} if self.variant == "bat" else {"slots": range(self.period)}

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        used = set(self.slots.tolist())
        unused = torch.tensor([slot for slot in range(self.period) if slot not in used])
        return {"slots": unused[torch.randperm(len(unused), generator=generator)[:n]]}


def _divisors(*sizes: int) -> list[int]:
    """Return the common divisors of some sizes."""
    common = math.gcd(*sizes)
    return [d for d in range(1, common + 1) if common % d == 0]
