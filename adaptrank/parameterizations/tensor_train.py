"""TensorTrain: LoRA whose two factors are tensor trains."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank._options import COUNT
from adaptrank.parameterizations import tensor_train_cores as trains
from adaptrank.parameterizations.base import Cost
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.traits import StudiedRate


class TensorTrain(LowRankUpdate):
    """W' = W + s (A B)^T with A (n, r) and B (r, m) as tensor trains.

    s = alpha / rank is fixed at construction. A[j_1 ... j_d, i] = A_1[j_1] A_2[j_2] ... A_{d+1}[i],
    a product of small matrices: the index of an input is written in modes j_1 ... j_d, row-major.
    Each bond between two cores is a rank axis. The computation is thin all the way,
    n -> bond -> bond -> m: the cores of the inputs are contracted to (n, bond) and those of the
    outputs to (bond, m), once a call.

    The last core of B starts at zero, so training starts at W. The authors' code draws it as well,
    so its training does not start at W (`init="released"`). That the paper has a step that lessens
    this is second-hand and not in the code.

    Source: LoRETTA_rep, arXiv:2402.11417. Its scripts use rank 8, alpha 16, tt_rank 5, dropout
        0.05. The authors' code does not clamp a bond to what its modes can use, and contracts all
        cores to the whole factor. So its trains need no bond between the modes of the layer and r.
        Seven of its nine for r = 8 have none on one side, 16, 16, 8, 4, 4 for 4096 x 8 among them,
        and have no place here.
    Shapes: W (m, n), A_k (r_{k-1}, n_k, r_k) for modes n_1 ... n_d of n and then r. B_k the same
        for r and then modes of m. Parameters: the sum of r_{k-1} n_k r_k over the cores of both.
    Args:
        rank: number r of columns of A. It is a mode, and no axis.
        alpha: numerator of the scale s.
        tt_rank: size of every bond at the start, as far as its modes can use it.
        in_modes: factors of n. Automatic ones are as equal as possible and at most 16 if n has such
            factors, the largest first.
        out_modes: factors of m. Automatic ones have the largest last.
        dropout: probability of dropping an input element on the way to A, in [0, 1).
        init: "zero_last", or "released" for the authors' start.
    Raises:
        ValueError: if rank or tt_rank is below 1, or modes do not multiply to the layer's size.
    """

    source = "arXiv:2402.11417"
    studied_rate = StudiedRate(1e-2, "docs/results/study_methods_at_defaults.md")
    ranges: ClassVar = {"in_modes": COUNT, "out_modes": COUNT}

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        tt_rank: int = 5,
        in_modes: list[int] | None = None,
        out_modes: list[int] | None = None,
        dropout: float = 0.0,
        init: Literal["zero_last", "released"] = "zero_last",
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if rank < 1 or tt_rank < 1:
            raise UserError(f"rank={rank}, tt_rank={tt_rank}: use 1 or more of both.")
        if init not in ("zero_last", "released"):
            raise UserError(f"init={init!r} is unknown; use 'zero_last' or 'released'.")
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        inputs = trains.check_modes(in_modes, n, "in_modes")
        self.modes = {
            "A": [*(inputs if in_modes else reversed(inputs)), rank],
            "B": [rank, *trains.check_modes(out_modes, m, "out_modes")],
        }
        for name, modes in self.modes.items():
            for k, shape in enumerate(trains.core_shapes(modes, tt_rank), 1):
                self.register_parameter(f"{name}_{k}", self.zeros(*shape))
            for core in self.cores(name):
                trains.draw(core, rank + (n if name == "A" else m), len(modes))
        if init == "zero_last":
            nn.init.zeros_(self.cores("B")[-1])
        self.starts_at_base = init == "zero_last"

    @property
    def axes(self) -> Mapping[str, Mapping[str, int | tuple[int, ...]]]:  # type: ignore[override]
        return trains.axes(self.modes)

    def cores(self, name: str) -> list[Tensor]:
        """Return the cores of A or B, first to last, with their gates."""
        return trains.gated_cores(self, name, len(self.modes[name]))

    @formula
    def weight(self) -> Tensor:
        A = trains.dense(self.cores("A"), self.shape[1])
        B = trains.dense(self.cores("B"), self.modes["B"][0])
        return self.base_weight + self.scale * (A @ B).T

    def factors(self) -> tuple[Tensor, Tensor]:
        U, V, scale = self.scaled_factors()
        return scale * U, V

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the two trains, cut at the first bond of B."""
        (*inputs, last), (first, *outputs) = self.cores("A"), self.cores("B")
        with trains.unrounded(last):
            between = last.flatten(1) @ first.flatten(0, 1)  # (bond of A, bond of B)
            return trains.right(outputs).T, (trains.left(inputs) @ between).T, self.scale

    def cost(self) -> Cost:
        (m, n), (*inputs, last), (first, *outputs) = self.shape, self.cores("A"), self.cores("B")
        a, r, b = last.shape[0], first.shape[1], first.shape[2]
        once = trains.flops_left(inputs) + trains.flops_right(outputs) + 2 * a * b * (r + n)
        return Cost(flops=2 * b * (m + n), flops_once=once, kept=n + b)

    def max_units(self, axis: str) -> int:
        return trains.max_bond(self.modes, axis)
