"""SBoRA: some columns, or some rows, of a frozen weight are trained, and nothing else."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost, Parameterization


class SBoRA(Parameterization):
    """W'[:, I] = W[:, I] + s B for r columns I (variant "fa"), or W'[I, :] = W[I, :] + s A for r rows (variant "fb").

    It is LoRA with one factor frozen to rows of the identity: A = E_I in "fa", B = E_I^T in "fb". s = alpha / rank is fixed at
    construction. The other factor starts at zero, and has a gradient at once. A unit is one column or one row, so units are
    orthogonal: ||W' - W||^2 is the sum over units. I is drawn without replacement, for each layer anew, from torch's
    global generator, and is saved; so seed the run. "fa" keeps r numbers a token for the backward pass, "fb" all n. (The
    release draws dropout before it gathers; the elements it keeps are distributed as here.)

    Source: arXiv:2407.05413; variants, scale, uniform indices and counts as in the released code, whose scripts
        use rank 32 or 64 and alpha = 2 rank.
    Shapes: W (m, n), index I (r,), B (m, r) or A (r, n). Parameters: r m in "fa", r n in "fb".
    Args:
        rank: number r of trained columns or rows.
        alpha: numerator of the scale s.
        variant: "fa" trains columns, one an input; "fb" trains rows, one an output.
        dropout: probability of dropping an input element on the way to the trained factor, in [0, 1).
    Raises:
        ValueError: if the variant is unknown, or rank is below 1 or above the number of columns or rows.
    """

    source = "arXiv:2407.05413"
    axes = {"rank": {"index": 0, "B": 1}}
    capabilities = frozenset(
        {"grow", "ordered", "pattern", "matrix_rank", "input_directions", "gradient_init"}
    )
    by_product = True
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
        most = self.max_units("rank")
        if not 1 <= rank <= most:
            what = "columns" if variant == "fa" else "rows"
            raise UserError(f"rank={rank} does not fit a layer of {most} {what}; use 1 to {most}.")
        m, n = self.shape
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        drawn = (
            torch.randperm(most, device="cpu")[:rank].sort().values
        )  # on the CPU: the same on every device
        self.register_buffer(
            "index", drawn.to(layers.device(self.innermost))
        )  # a buffer: casts leave integers alone
        if variant == "fa":
            self.B = self.zeros(m, rank)
        else:
            self.A = self.zeros(rank, n)
            self.axes, self.input_factor = {"rank": {"index": 0, "A": 0}}, {"rank": "A"}

    @property
    def weight(self) -> Tensor:
        if self.variant == "fa":
            return self.base_weight.index_add(1, self.index, self.scale * self.B)
        return self.base_weight.index_add(0, self.index, self.scale * self.A)

    def adapted(self, x: Tensor) -> Tensor:
        if self.variant == "fa" and self.multiplies(x) and self.dropout.p and self.training:
            some = x.index_select(
                -1, self.index
            )  # gathered first: the slice is all that is dropped and kept
            return self.accumulated(x, self.dropout(some), self.scale * self.B)
        return cast(Tensor, super().adapted(x))

    def product(self) -> tuple[Tensor, Tensor]:
        """The other factor is rows of the identity."""
        (m, n), trained = self.shape, self.B if self.variant == "fa" else self.A
        rows = F.one_hot(self.index, n if self.variant == "fa" else m).to(trained.dtype)
        return (
            (self.scale * trained, rows) if self.variant == "fa" else (rows.T, self.scale * trained)
        )

    def cost(self) -> Cost:
        (m, n), r = self.shape, len(self.index)
        return Cost(flops=2 * r * (m + n), kept=r if self.variant == "fa" else n)

    def max_units(self, axis: str) -> int:
        m, n = self.shape
        return n if self.variant == "fa" else m

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        used = set(self.index.tolist())
        unused = torch.tensor([unit for unit in range(self.max_units(axis)) if unit not in used])
        return {"index": unused[torch.randperm(len(unused), generator=generator)[:n]]}
