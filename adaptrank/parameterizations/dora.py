"""DoRA: LoRA on the direction of every row, and a trained magnitude for each."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.ops import low_rank as products
from adaptrank.parameterizations.base import Cost, Parameterization


class DoRA(Parameterization):
    """W' = diag(m / ||V||) V with V = W + s B A and one norm a row; s = alpha / rank fixed at construction.

    Row norms come without an (m, n) product: ||V_j||^2 = ||W_j||^2 + 2 s (W A^T)_j B_j + s^2 B_j (A A^T) B_j. As the paper
    proposes, the norm is a constant for the gradient; with `detach_norm=False` autograd sees it too.

    Source: arXiv:2402.09353.
    Shapes: W (m, n), A (r, n), B (m, r), magnitude m (m,). Parameters: r (m + n) + m.
    Args:
        rank: number r of rank-one units.
        alpha: numerator of the scale s.
        dropout: probability of dropping an input element, in [0, 1); above 0 the scaled part of W x is computed from the
            dropped input as well, a second product with W, as in HF PEFT.
        detach_norm: treat the row norms as constants in the backward pass.
    Raises:
        ValueError: if rank < 1.
    """

    source = "arXiv:2402.09353"
    accepts = layers.MATRICES
    reads_weight = True
    axes = {"rank": {"A": 0, "B": 1}}
    capabilities = frozenset(
        {"grow", "duplicate", "ordered", "pattern", "matrix_rank", "input_directions"}
    )
    input_factor = {"rank": "A"}
    squares: Tensor | None
    no_decay = ("m",)  # decay would shrink the layer itself
    exact_gradient = {"detach_norm": False}

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
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.m = self.zeros(m)
        self.register_buffer("squares", None, persistent=False)  # ||W_j||^2, (m,), once computed
        with torch.no_grad():
            self.m.copy_(
                self._norm()
            )  # the same arithmetic as in training, so that m / ||V|| starts at 1 exactly

    @property
    def weight(self) -> Tensor:
        V = self.base_weight + self.scale * self.B @ self.A
        norm = V.norm(dim=1).clamp_min(
            math.sqrt(torch.finfo(V.dtype).tiny)
        )  # as in _norm: a row of zeros stays one
        scale: Tensor = self.m / (norm.detach() if self.detach_norm else norm)
        return scale[:, None] * V

    def adapted(self, x: Tensor) -> Tensor:
        if not self.multiplies(x) or self.dropped(x) is not x:
            return cast(Tensor, super().adapted(x))
        y = self.with_product(x, self.scale * self.B, self.A)
        # The bias is subtracted inside the deviation, so that k = 1 is the identity to the last bit.
        return products.scale_output(y, self.m / self._norm() - 1, self.bias)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        k = self.m / self._norm()
        if x.is_floating_point() and self.dropout.p and self.training:
            x = self.dropout(x)
            y = layers.channels_last(self.innermost, self.base(x.to(y.dtype)))
        z = y if self.bias is None else y - self.bias
        return (k - 1) * z + k * self.scale * F.linear(self.project(x, self.A), self.B)

    def cost(self) -> Cost:
        (m, n), r = self.shape, len(self.A)
        return Cost(
            flops=2 * r * (m + n), flops_once=2 * r * (m * n + r * n + r * m), kept=n + r + m
        )

    def refresh(self) -> None:
        self.squares = None  # the base may have been loaded anew

    def _norm(self) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            s, A, B, squares = self.scale, self.A, self.B, self.squares
            if isinstance(self.base, Parameterization):  # it trains, and its norms change
                W = self.base_weight
                squares = W.square().sum(1)
            else:  # of a bf16 weight the product is taken in bf16, like the layer's own
                dtype = layers.dtype(self.base)
                W = layers.dense(
                    self.base, dtype if dtype == torch.bfloat16 else self.adapter_dtype
                )
                if squares is None:
                    squares = self.squares = self.base_weight.square().sum(1)
            # Summed in float64: the terms may cancel, and a fresh unit must not change the order of rounding.
            exact = squares.double() + 2 * s * ((W @ A.to(W.dtype).T) * B).sum(
                1, dtype=torch.float64
            )
            exact = exact + s * s * ((B @ (A @ A.T)) * B).sum(1, dtype=torch.float64)
            return exact.clamp_min(torch.finfo(squares.dtype).tiny).sqrt().to(squares.dtype)
