"""NEAT: a small network that reads the frozen weight and writes its change."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.capabilities import Capability
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.traits import StudiedRate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class NEAT(LowRankUpdate):
    """W' = W + s B H with H = f(A W), a hidden layer of r units over the columns of W.

    s is the argument `scale`. With `side="input"` the network runs over the rows instead:
    W' = W + s H B^T with H = f(W A^T). Of depth L > 0 it goes on with H_{l+1} = f(E_l H_l) for
    l < L, and comes back with H <- f(D_l H) + H_{L-1-l}, so it has 2 + 2 L layers.

    H and its two thin products with x are computed, never the (m, n) change. H is computed anew at
    every call, at 2 r m n operations. For a single token that is r times the frozen product, so
    merge before generating. H scales with W, and the useful s with the layer. A unit of a ReLU that
    is off everywhere stays off.

    Source: arXiv:2410.01870, later named PEANuT. For depths above 0 the wiring is that of HF PEFT's
        `peanut`, whose `depth` is L, too. The authors' code has both sides: output for GLUE and
        vision, input for language models. No table was read.
    Shapes: W (m, n), A (r, d), B (d, r), E_l and D_l (r, r), where d is m, or n for the input side.
        Parameters: 2 r d + 2 L r^2.
    Args:
        rank: number r of hidden units. HF PEFT has 32.
        depth: number L of encoders, and of decoders.
        activation: f.
        side: side of W that the network reads.
        scale: s. The authors use 0.01 to 1 on GLUE, by task, and alpha / rank on language models.
        dropout: probability of dropping an input element on the way to the change, in [0, 1). The
            authors drop none.
    Raises:
        ValueError: if rank < 1 or depth < 0.
    """

    source = "arXiv:2410.01870"
    studied_rate = StudiedRate(2e-3, "docs/results/study_methods_at_defaults.md")
    capabilities = frozenset({Capability.GROW, Capability.ORDERED, Capability.PATTERN})
    accepts = layers.MATRICES
    reads_weight = True

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        depth: int = 0,
        activation: Literal["relu", "gelu", "silu"] = "relu",
        side: Literal["output", "input"] = "output",
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        if rank < 1 or depth < 0:
            raise UserError(
                f"rank={rank}, depth={depth}: NEAT has at least one unit; use rank >= 1 and "
                f"depth >= 0."
            )
        self.scale = scale
        self.depth = depth
        self.activation = activation
        self.side = side
        self.dropout = nn.Dropout(dropout)
        d = self.shape[0 if side == "output" else 1]
        self.A = self.zeros(rank, d)
        self.B = self.zeros(d, rank)
        for name in self._square_names():
            self.register_parameter(name, self.zeros(rank, rank))
        for name in ("A", *self._square_names()):
            nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))

    @property
    def axes(self) -> Mapping[str, Mapping[str, int | tuple[int, ...]]]:  # type: ignore[override]
        return {"rank": {"A": 0, **dict.fromkeys(self._square_names(), (0, 1)), "B": 1}}

    def _square_names(self) -> list[str]:
        """Return the names of the encoders, then of the decoders."""
        return [f"{kind}_{level}" for kind in "ED" for level in range(self.depth)]

    @formula
    def weight(self) -> Tensor:
        W, B = self.base_weight, self.gated("B")
        if self.side == "input":
            return W + self.scale * (B @ self._network(self.A @ W.T)).T
        return W + self.scale * B @ self._network(self.A @ W)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return B and the hidden layer."""
        U, V, scale = self.scaled_factors()
        return scale * U.to(self.A.dtype), V.to(self.A.dtype)

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return B, and the hidden layer in the dtype in which the product reads it."""
        hidden = self._first_product()
        if self.depth:
            hidden = hidden.to(self.A.dtype)
        H, B = self._network(hidden), self.gated("B")
        return (H.T, B.T, self.scale) if self.side == "input" else (B, H, self.scale)

    def cost(self) -> Cost:
        (m, n), r = self.shape, len(self.A)
        width = n if self.side == "output" else m
        once = 2 * r * m * n + 4 * self.depth * r * r * width
        return Cost(flops=2 * r * (m + n), flops_once=once, kept=n + r)

    def _network(self, H: Tensor) -> Tensor:
        """Return the last hidden layer for A W, or for A W^T. Both are (r, the other side of W)."""
        f = ACTIVATIONS[self.activation]
        H = f(H)
        hidden = []
        for level in range(self.depth):
            hidden.append(H)
            H = f(getattr(self, f"E_{level}") @ H)
        for level in range(self.depth):
            H = f(getattr(self, f"D_{level}") @ H) + hidden.pop()
        return H

    def _first_product(self) -> Tensor:
        """Return A W, or A W^T for the input side, in the dtype in which it was computed."""
        # A wrapper inside that trains gets a gradient through its weight.
        if isinstance(self.base, Parameterization):
            inner = self.base_weight.to(self.A.dtype)
            return self.A @ (inner.T if self.side == "input" else inner)

        def frozen_weight() -> Tensor:
            # A product with a bf16 weight is taken in bf16, like the layer's own.
            dtype = layers.dtype(self.base)
            W = layers.dense(self.base, dtype if dtype == torch.bfloat16 else self.A.dtype)
            return W.T if self.side == "input" else W

        return _FrozenProduct.apply(self.A, frozen_weight)  # type: ignore[no-untyped-call, no-any-return]


class _FrozenProduct(torch.autograd.Function):
    """A W for a frozen W, which is made dense again for the backward pass.

    So no copy of a half-precision or quantized weight is kept.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, frozen_weight: Callable[[], Tensor]) -> Tensor:
        ctx.frozen_weight = frozen_weight
        ctx.dtype = A.dtype
        W = frozen_weight()
        return A.to(W.dtype) @ W

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W = ctx.frozen_weight()
        return (grads[0].to(W.dtype) @ W.T).to(ctx.dtype), None
