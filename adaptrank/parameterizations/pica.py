"""PiCa: a change inside the leading singular directions of a frozen weight.

One trained factor serves all layers of a kind.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost
from adaptrank.parameterizations.capabilities import Capability
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.traits import StudiedRate


class PiCa(LowRankUpdate):
    """W' = W + M P, with P (r, n) frozen to leading right singular vectors of W.

    `adapt` ties M across the layers of a kind. With side="output" W' = W + P M, and P (m, r) has
    left singular vectors. There is no scale. M starts at zero and has a gradient at once.

    Each layer has a P of its own, from the singular value decomposition of its frozen weight in
    float32 or better. Wrappers inside do not count. Each vector is signed so that its largest entry
    is positive. P is saved, not recomputed: another machine may turn vectors of close singular
    values. As P is orthonormal, ||W' - W|| = ||M||.

    A unit is one singular direction in every layer that shares M. It costs its slice of M once, and
    pruning takes it from all of them. Growing adds the unused directions of the largest singular
    values, which takes another decomposition.

    Source: arXiv:2505.20211. Side, start and missing scale are those of the released code, which
        uses rank 32 or 256 and learning rate 1e-3. An earlier version of the paper may mean the
        output side. That is taken from a summary, not verified.
    Shapes: W (m, n), P (r, n), index (r,), M (m, r). On the output side P (m, r), M (r, n).
        Parameters: r m, or r n on the output side, once for all layers that share M.
    Args:
        rank: number r of singular directions.
        side: "input" or "output", the side whose singular vectors are frozen.
        share: tie M across the layers of one kind and shape.
    Raises:
        ValueError: if the side is unknown, or rank is below 1 or above min(m, n).
    """

    source = "arXiv:2505.20211"
    studied_rate = StudiedRate(1e-3, "docs/results/study_hyperadapt_trec.md")
    accepts = layers.MATRICES
    axes = {"rank": {"P": 0, "index": 0, "M": 1}}
    capabilities = frozenset(
        {
            Capability.GROW,
            Capability.ORDERED,
            Capability.PATTERN,
            Capability.MATRIX_RANK,
            Capability.INPUT_DIRECTIONS,
            Capability.GRADIENT_INIT,
            Capability.WEIGHT_GRADIENT,
        }
    )
    features = {"P": (None, 1), "M": (0, None)}
    shared: tuple[str, ...] = ("M",)
    reads_blocks = True
    P: Tensor
    index: Tensor

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        side: Literal["input", "output"] = "input",
        share: bool = True,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if side not in ("input", "output"):
            raise UserError(f"side={side!r} is unknown; use 'input' or 'output'.")
        if not 1 <= rank <= min(m, n):
            raise UserError(f"rank={rank} does not fit a {m}x{n} layer; use 1 to {min(m, n)}.")
        self.side = side
        if side == "output":
            self.axes, self.input_factor = {"rank": {"P": 1, "index": 0, "M": 0}}, {"rank": "M"}
            self.features = {"P": (0, None), "M": (None, 1)}
        if not share:
            self.shared = ()
        index = torch.arange(rank, device=layers.device(self.innermost))
        self.register_buffer("index", index)
        self.register_buffer("P", self._directions(index))
        self.M = self.zeros(m, rank) if side == "input" else self.zeros(rank, n)

    @formula
    def weight(self) -> Tensor:
        M = self.gated("M")
        return self.base_weight + (M @ self.P if self.side == "input" else self.P @ M)

    def factors(self) -> tuple[Tensor, Tensor]:
        M = self.gated("M")
        return (M, self.P) if self.side == "input" else (self.P, M)

    def factor_pair(self) -> FactorPair:
        if self.side == "input":
            return FactorPair(B=("M", 1), A=("P", 0))
        return FactorPair(B=("P", 1), A=("M", 0))

    def weight_gradient(self) -> Tensor:
        """Return gM P, or P gM, with gM the gradient of M.

        It is the gradient of W' on the span of the frozen directions, and exact there.
        """
        gM = torch.zeros_like(self.M) if self.M.grad is None else self.M.grad
        return gM @ self.P if self.side == "input" else self.P @ gM

    def cost(self) -> Cost:
        (m, n), r = self.shape, len(self.index)
        return Cost(flops=2 * r * (m + n), kept=r if self.side == "input" else n)

    def max_units(self, axis: str) -> int:
        return min(self.shape)

    def index_ranges(self) -> dict[str, range]:
        return {"index": range(self.max_units("rank"))}

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        used = set(self.index.tolist())
        unused = [unit for unit in range(self.max_units(axis)) if unit not in used]
        index = torch.tensor(unused[:n], device=self.index.device)
        return {"P": self._directions(index), "index": index}

    @torch.no_grad()
    def _directions(self, index: Tensor) -> Tensor:
        """Return singular vectors of the frozen weight, (k, n), or (m, k) on the output side.

        Args:
            index: positions of the vectors, (k,), counted from the largest singular value.
        """
        W = layers.dense(self.innermost, self.adapter_dtype)
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        rows: Tensor = (Vh if self.side == "input" else U.T).index_select(0, index)
        rows *= rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        return rows if self.side == "input" else rows.T.contiguous()
