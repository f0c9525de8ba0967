"""DoRA: LoRA on the direction of every row, and a trained magnitude for each row."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.ops import low_rank as ops
from adaptrank.ops import magnitude, scaling
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.capabilities import DEFAULT_CAPABILITIES, Capability
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.lora import AXES_OF_EMBEDDING
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate


class DoRA(Parameterization):
    """W' = diag(m / ||V||) V with V = W + s B A, and one norm for each row.

    s = alpha / rank is fixed at construction. Row norms need no (m, n) product:
    ||V_j||^2 = ||W_j||^2 + 2 s (W A^T)_j B_j + s^2 B_j (A A^T) B_j. As the paper proposes, the norm
    is a constant for the gradient. With `detach_norm=False` autograd sees it, too.

    A and B start as those of LoRA do, also over an embedding.

    Source: arXiv:2402.09353.
    Shapes: W (m, n), A (r, n), B (m, r), magnitude m (m,). Parameters: r (m + n) + m.
    Args:
        rank: number r of rank-1 components.
        alpha: numerator of the scale s.
        dropout: probability of dropping an input element, in [0, 1). Above 0, the scaled part of
            W x is computed from the dropped input as well, a second product with W, as in HF PEFT.
        detach_norm: treat the row norms as constants in the backward pass.
    Raises:
        ValueError: if rank < 1.
    """

    source = "arXiv:2402.09353"
    accepts = layers.MATRICES
    reads_weight = True
    axes = {"rank": {"A": 0, "B": 1}}
    capabilities = DEFAULT_CAPABILITIES | {Capability.MATRIX_RANK, Capability.INPUT_DIRECTIONS}
    input_factor = {"rank": "A"}
    # Weight decay on the magnitude would shrink the layer itself.
    no_decay = ("m",)
    kinds = {"m": TensorKind.MAGNITUDES}
    studied_rate = StudiedRate(1e-3, "docs/results/study_hyperadapt_trec.md")
    exact_gradient = {"detach_norm": False}
    squares: Tensor | None
    """||W_j||^2 of the rows, (m,), or None before it is computed."""
    _squared_version: tuple[int, int] | None = None

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        detach_norm: bool = True,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if rank < 1:
            raise UserError(f"rank={rank}: a DoRA has at least one unit; use rank >= 1.")
        self.scale = alpha / rank
        self.detach_norm = detach_norm
        self.dropout = nn.Dropout(dropout)
        self.A = self.zeros(rank, n)
        self.B = self.zeros(m, rank)
        if isinstance(self.innermost, nn.Embedding):
            self.axes = AXES_OF_EMBEDDING
            nn.init.normal_(self.B)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.m = self.zeros(m)
        self.register_buffer("squares", None, persistent=False)
        # The same arithmetic as in training, so that m / ||V|| starts at 1 exactly.
        with torch.no_grad():
            self.m.copy_(self.row_norms(self.B))

    @formula
    def weight(self) -> Tensor:
        V = self.base_weight + self.scale * self.gated("B") @ self.gated("A")
        # As in `row_norms`, a row of zeros stays a row of zeros.
        norm = V.norm(dim=1).clamp_min(math.sqrt(torch.finfo(V.dtype).tiny))
        scale: Tensor = self.m / (norm.detach() if self.detach_norm else norm)
        return scale[:, None] * V

    def forward_adapted(self, x: Tensor) -> Tensor:
        drops = self.dropout.p > 0 and self.dropout.training
        if drops or not self.fuses(x):
            return super().forward_adapted(x)
        B, A = self.gated("B"), self.gated("A")
        frozen = ops.plain(self.base, x.dtype) if self.detach_norm else None
        if frozen is not None:
            squares = self._frozen_squares()
            return magnitude.linear(x, *frozen, squares, A, B, self.m, self.scale)
        y = self.add_product(x, B, A, self.scale)
        # The bias is subtracted inside the deviation, so that k = 1 is the identity to the bit.
        return scaling.scale_output(y, self.m / self.row_norms(B, A) - 1, self.trained_bias())

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        B, A, bias = self.gated("B"), self.gated("A"), self.trained_bias()
        k = self.m / self.row_norms(B, A)
        if x.is_floating_point() and self.dropout.p and self.training:
            x = self.dropout(x)
            y = layers.channels_last(self.innermost, self.base(x.to(y.dtype)))
        z = y if bias is None else y - bias
        return (k - 1) * z + k * self.scale * F.linear(self.project(x, A), B)

    def cost(self) -> Cost:
        (m, n), r = self.shape, len(self.A)
        once = 2 * r * (m * n + r * n + r * m + m)
        return Cost(flops=2 * r * (m + n), flops_once=once, kept=n + r + m)

    def factor_pair(self) -> FactorPair:
        # Direction and row norms depend on the product alone. The magnitude is beside it.
        return FactorPair(B=("B", 1), A=("A", 0), scale=self.scale)

    def acts_without(self, axis: str) -> bool:
        return True  # the magnitude

    def refresh(self) -> None:
        # The base may have been loaded anew. A sharded or quantized weight is read in the next
        # forward pass.
        self.squares = None
        is_nest = isinstance(self.base, Parameterization)
        if not is_nest and type(self.base.weight) is nn.Parameter:
            self._frozen_squares()

    def row_norms(self, B: Tensor, A: Tensor | None = None) -> Tensor:
        """Return ||V_j|| for each row j of V = W + s B A, (m,), by default with the present A."""
        A = self.A if A is None else A
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            W, squares = self._frozen_rows()
            return magnitude.row_norms(W, squares, A, B, self.scale)

    def _frozen_rows(self) -> tuple[Tensor, Tensor]:
        """Return W (m, n) of what this wraps, and ||W_j||^2 of its rows, (m,)."""
        # A base that trains changes its norms.
        if isinstance(self.base, Parameterization):
            W = self.base_weight
            return W, W.square().sum(1)
        # A product with a bf16 weight is taken in bf16, like the layer's own.
        dtype = layers.dtype(self.base)
        W = layers.dense(self.base, dtype if dtype == torch.bfloat16 else self.adapter_dtype)
        return W, self._frozen_squares()

    def _frozen_squares(self) -> Tensor:
        """Return ||W_j||^2 of the rows of a base that is no wrapper, (m,)."""
        # A model may rescale its weights in place.
        version = _version(self.base)
        is_stale = version is not None and version != self._squared_version
        if self.squares is None or is_stale:
            self.squares = self.base_weight.square().sum(1)
            self._squared_version = version
        return self.squares


def _version(layer: nn.Module) -> tuple[int, int] | None:
    """Return numbers that change when a weight is written to in place or gets another storage.

    Writes through `weight.data` are not seen. Call `refresh()` after them.

    It is None where tensors do not count their versions: in inference mode, and in a compiled
    graph, which takes a frozen weight for a constant.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor) or torch.compiler.is_compiling() or weight.is_inference():
        return None
    return weight._version, weight.untyped_storage()._cdata
