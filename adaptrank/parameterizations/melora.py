"""MELoRA: small LoRAs side by side, each on its own slice of inputs and outputs."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.capabilities import DEFAULT_CAPABILITIES, Capability
from adaptrank.parameterizations.derived import Derived
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.traits import StudiedRate

FEW_UNITS = 64
"""Up to this number of units, one thin product with zeros in it is the fastest."""


class MELoRA(LowRankUpdate):
    """W' = W + blockdiag(s_1 B_1 A_1, ..., s_k B_k A_k), with s_j = alpha / rank_j.

    The scales are fixed at construction. Slice j of the outputs sees slice j of the inputs only. So
    a unit costs (m + n) / k, and the rank of the change is the sum of the ranks of the k
    mini-LoRAs. A unit belongs to one mini for good. A fresh unit joins a mini with the fewest
    units. A mini may end without any. Blocks off the diagonal keep every bit when the change is
    merged. Which inputs see which outputs depends on their order: if k divides the number of heads,
    slices are whole heads.

    Source: arXiv:2402.17263 (abstract and released code). No table was read.
    Shapes: W (m, n), A (R, n/k), B (m/k, R), block (R,) the mini of each unit.
        Parameters: R (m + n) / k. For equal ranks r, R = r k and they are r (m + n).
    Args:
        rank: units of each mini, or a list with one number for each mini.
        minis: number k of mini-LoRAs, the paper's n. It must divide m and n.
        alpha: numerator of the scales s_j.
        dropout: probability of dropping an input element on the way to A, in [0, 1). The authors
            use 0.05 on GLUE.
    Raises:
        ValueError: if the minis do not divide the layer, a rank is below 1, or there is not one
            rank for each mini.
    """

    source = "arXiv:2402.17263"
    reads_blocks = True
    axes = {"rank": {"A": 0, "block": 0, "B": 1}}
    studied_rate = StudiedRate(3e-3, "docs/results/study_budgets.md")
    capabilities = DEFAULT_CAPABILITIES | {
        Capability.MATRIX_RANK,
        Capability.INPUT_DIRECTIONS,
        Capability.GRADIENT_INIT,
    }
    input_factor = {"rank": "A"}
    block: Tensor
    """Mini of each unit, (R,)."""
    units: Tensor
    """Units of each mini, (k, the largest rank), padded with R."""
    scales: Tensor
    """Scale of each mini, (k,)."""

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int | list[int] = 1,
        minis: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if minis < 1 or m % minis or n % minis:
            fits = [k for k in range(1, min(m, n) + 1) if m % k == n % k == 0]
            raise UserError(f"minis={minis} does not divide a {m}x{n} layer; use one of {fits}.")
        ranks = [rank] * minis if isinstance(rank, int) else list(rank)
        if len(ranks) != minis or min(ranks) < 1:
            raise UserError(
                f"rank={rank}: {minis} minis need one rank each, of 1 or more; use rank=1, or "
                f"such a list."
            )
        self.minis = self.parts = minis
        self.alphas = [alpha / r for r in ranks]
        self.dropout = nn.Dropout(dropout)
        self.A = self.zeros(sum(ranks), n // minis)
        self.B = self.zeros(m // minis, sum(ranks))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        block = torch.empty(sum(ranks), dtype=torch.long, device=self.A.device)
        if not block.is_meta:
            block.copy_(_minis_in_turn(ranks))
        self.register_buffer("block", block)
        self._places, self._scaled_places = Derived(), Derived()
        self.refresh()

    def refresh(self) -> None:
        of_mini: list[list[int]] = [[] for _ in range(self.minis)]
        if not self.block.is_meta:
            for unit, mini in enumerate(self.block.tolist()):
                of_mini[mini].append(unit)
        widest = max(1, *map(len, of_mini))
        padding = len(self.block)
        rows = [units + [padding] * (widest - len(units)) for units in of_mini]
        units = torch.tensor(rows, device=self.block.device)
        self.register_buffer("units", units, persistent=False)
        scales = torch.tensor(self.alphas, device=self.block.device, dtype=self.A.dtype)
        self.register_buffer("scales", scales, persistent=False)
        self._places.forget()
        self._scaled_places.forget()

    @property
    def places(self) -> Tensor:
        """1 where a unit belongs to a mini, and 0 elsewhere, (R, k, 1), in the dtype of A."""

        def compute() -> Tensor:
            minis = torch.arange(self.minis, device=self.block.device)
            return (self.block[:, None] == minis)[:, :, None]

        return self._places.of(self.block, self.A.dtype, compute)

    @property
    def scaled_places(self) -> Tensor:
        """The scale of a mini where a unit belongs to it, and 0 elsewhere, (k, 1, R)."""

        def compute() -> Tensor:
            scaled = self.places.permute(1, 2, 0) * self.scales[:, None, None]
            return scaled.contiguous()

        return self._scaled_places.of(self.block, self.A.dtype, compute)

    @formula
    def weight(self) -> Tensor:
        B = self.gated("B")
        scaled = B * self.scales.to(B.dtype)[self.block]
        blocks = (scaled[:, self.block == j] @ self.A[self.block == j] for j in range(self.minis))
        return self.base_weight + cast(Tensor, torch.block_diag(*blocks))  # type: ignore[no-untyped-call]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return each unit with zeros outside of its slices."""
        U = self.scaled_places * self.gated("B")  # (k, m/k, R)
        V = self.places * self.A[:, None]  # (R, k, n/k)
        return U.flatten(0, 1), V.flatten(1)

    def factor_pair(self) -> FactorPair:
        return FactorPair(B=("B", 1), A=("A", 0), scale=self.scales, blocks=self.units)

    def fuses(self, x: Tensor) -> bool:
        """Return whether products with x are fused: many units have one product for each mini."""
        return len(self.block) <= FEW_UNITS and Parameterization.fuses(self, x)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        slices = self.dropout(x).reshape(-1, self.minis, self.A.shape[1])
        B = self.gated("B").T * self.scales.to(self.B.dtype)[self.block, None]
        z = torch.bmm(slices.transpose(0, 1), self._batched(self.A).mT)  # (k, N, the largest rank)
        z = torch.bmm(z, self._batched(B))  # (k, N, m/k)
        return z.transpose(0, 1).reshape(*x.shape[:-1], self.shape[0])

    def _batched(self, units: Tensor) -> Tensor:
        """Return (R, d) as (k, the largest rank, d), with zeros where a mini has fewer units."""
        return torch.cat([units, units.new_zeros(1, units.shape[1])])[self.units]

    def cost(self) -> Cost:
        (m, n), widest, units = self.shape, self.units.shape[1], len(self.block)
        if units <= FEW_UNITS:
            return Cost(flops=2 * units * (m + n), kept=n + units)
        return Cost(flops=2 * widest * (m + n), kept=n + self.minis * widest)

    def index_ranges(self) -> dict[str, range]:
        return {"block": range(self.minis)}

    def of_inputs(self, axis: str, values: Tensor) -> Tensor:
        return values.view(self.minis, -1)[self.block]

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        width = self.A.shape[1]
        drawn = torch.rand(n, width, generator=generator, dtype=torch.float64)
        counts = torch.bincount(self.block.cpu(), minlength=self.minis).tolist()
        joined = []
        for _ in range(n):
            mini = counts.index(min(counts))
            joined.append(mini)
            counts[mini] += 1
        return {"A": (2 * drawn - 1) / math.sqrt(width), "block": torch.tensor(joined)}


def _minis_in_turn(ranks: list[int]) -> Tensor:
    """Return the mini of each unit, (R,): the first unit of each mini, then the second of each.

    So the first units alone are as even as they can be.
    """
    counts = torch.tensor(ranks)
    minis = torch.arange(len(ranks)).repeat_interleave(counts)
    first_units = (counts.cumsum(0) - counts).repeat_interleave(counts)
    position_in_mini = torch.arange(len(minis)) - first_units
    return minis[position_in_mini.argsort(stable=True)]
