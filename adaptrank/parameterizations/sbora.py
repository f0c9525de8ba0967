"""SBoRA: some columns, or some rows, of a frozen weight are trained, and nothing else."""

from typing import Literal

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost
from adaptrank.parameterizations.capabilities import Capability
from adaptrank.parameterizations.derived import Derived
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.traits import StudiedRate


class SBoRA(LowRankUpdate):
    """W'[:, I] = W[:, I] + s B for r columns I, or W'[I, :] = W[I, :] + s A for r rows I.

    Variant "fa" trains columns, and "fb" rows.

    It is LoRA with one factor frozen to rows of the identity: A = E_I in "fa", B = E_I^T in "fb".
    s = alpha / rank is fixed at construction. The other factor starts at zero, and has a gradient
    at once. A unit is one column or one row, so units are orthogonal: ||W' - W||^2 is the sum over
    units. I is drawn without replacement, for each layer anew, from torch's global generator, and
    is saved, so seed the run. "fa" keeps r numbers a token for the backward pass, "fb" all n. The
    release draws dropout before it gathers. The elements that it keeps are distributed as here.

    Source: arXiv:2407.05413. Variants, scale, uniform indices and counts are as in the released
        code, whose scripts use rank 32 or 64 and alpha = 2 rank.
    Shapes: W (m, n), index I (r,), B (m, r) or A (r, n). Parameters: r m in "fa", r n in "fb".
    Args:
        rank: number r of trained columns or rows.
        alpha: numerator of the scale s.
        variant: "fa" trains columns, one for each input. "fb" trains rows, one for each output.
        dropout: probability of dropping an input element on the way to the trained factor, in
            [0, 1).
    Raises:
        ValueError: if the variant is unknown, or rank is below 1 or above the number of columns or
            rows.
    """

    source = "arXiv:2407.05413"
    axes = {"rank": {"index": 0, "B": 1}}
    studied_rate = StudiedRate(3e-3, "docs/results/study_budgets.md")
    capabilities = frozenset(
        {
            Capability.GROW,
            Capability.ORDERED,
            Capability.PATTERN,
            Capability.MATRIX_RANK,
            Capability.INPUT_DIRECTIONS,
            Capability.GRADIENT_INIT,
        }
    )
    index: Tensor

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        variant: Literal["fa", "fb"] = "fa",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        if variant not in ("fa", "fb"):
            raise UserError(f"variant={variant!r} is unknown; use 'fa' (columns) or 'fb' (rows).")
        self.variant = variant
        largest = self.max_units("rank")
        if not 1 <= rank <= largest:
            kind = "columns" if variant == "fa" else "rows"
            raise UserError(
                f"rank={rank} does not fit a layer of {largest} {kind}; use 1 to {largest}."
            )
        m, n = self.shape
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        # Drawn on the CPU, so that it is the same on every device.
        index = torch.randperm(largest, device="cpu")[:rank].sort().values
        self.register_buffer("index", index.to(layers.device(self.innermost)))
        if variant == "fa":
            self.B = self.zeros(m, rank)
        else:
            self.A = self.zeros(rank, n)
            self.axes, self.input_factor = {"rank": {"index": 0, "A": 0}}, {"rank": "A"}
        self._selector = Derived()

    def refresh(self) -> None:
        self._selector.forget()

    @property
    def selector(self) -> Tensor:
        """Rows of the identity, (r, n), or (r, m) in "fb", in the dtype of the layer."""

        def compute() -> Tensor:
            units = torch.arange(self.max_units("rank"), device=self.index.device)
            return self.index[:, None] == units

        return self._selector.of(self.index, layers.dtype(self.innermost), compute)

    @formula
    def weight(self) -> Tensor:
        if self.variant == "fa":
            return self.base_weight.index_add(1, self.index, self.scale * self.gated("B"))
        return self.base_weight.index_add(0, self.index, self.scale * self.gated("A"))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the trained factor, and rows of the identity for the other."""
        U, V, s = self.scaled_factors()
        if self.variant == "fa":
            return s * U, V.to(U.dtype)
        return U.to(V.dtype), s * V

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        if self.variant == "fa":
            return self.gated("B"), self.selector, self.scale
        return self.selector.T, self.gated("A"), self.scale

    def factor_pair(self) -> FactorPair:
        if self.variant == "fa":
            return FactorPair(B=("B", 1), A=("selector", 0), scale=self.scale)
        return FactorPair(B=("selector", 0), A=("A", 0), scale=self.scale)

    def forward_adapted(self, x: Tensor) -> Tensor:
        drops = self.dropout.p and self.training
        if self.variant == "fa" and drops and self.fuses(x):
            # Gathered first: the slice is all that is dropped and kept.
            columns = x.index_select(-1, self.index)
            return self.add_low_rank(x, self.dropout(columns), self.gated("B"), self.scale)
        return super().forward_adapted(x)

    def cost(self) -> Cost:
        (m, n), r = self.shape, len(self.index)
        return Cost(flops=2 * r * (m + n), kept=r if self.variant == "fa" else n)

    def max_units(self, axis: str) -> int:
        m, n = self.shape
        return n if self.variant == "fa" else m

    def index_ranges(self) -> dict[str, range]:
        return {"index": range(self.max_units("rank"))}

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        used = set(self.index.tolist())
        unused = torch.tensor([unit for unit in range(self.max_units(axis)) if unit not in used])
        return {"index": unused[torch.randperm(len(unused), generator=generator)[:n]]}
