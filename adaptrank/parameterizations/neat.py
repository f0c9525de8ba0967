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

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class NEAT(Parameterization):
    """W' = W + s B H with H = f(A W), a hidden layer of r units over the columns of W; s is the argument `scale`.

    With `side="input"` the network runs over the rows instead: W' = W + s H B^T with H = f(W A^T). Of depth L > 0 it goes
    on with H_{l+1} = f(E_l H_l) for l < L, and comes back with H <- f(D_l H) + H_{L-1-l}, so it has 2 + 2 L layers.
    What is computed is H and its two thin products with x, never the (m, n) change. H is computed anew at every call, at
    2 r m n operations: of a single token that is r times the frozen product, so merge before generating. H scales with W, and the
    useful s with the layer. A unit of a ReLU that is off everywhere stays off.

    Source: arXiv:2410.01870, later named PEANuT. Of depths above 0 the wiring is that of HF PEFT's `peanut`, whose
    `depth` is L, too. The authors' code has both sides: output for GLUE and vision, input for language models. No table was read.
    Shapes: W (m, n), A (r, d), B (d, r), E_l and D_l (r, r), where d is m, or n for the input side. Parameters: 2 r d + 2 L r^2.
    Args:
        rank: number r of hidden units; HF PEFT has 32.
        depth: number L of encoders, and of decoders.
        activation: f.
        side: which side of W the network reads.
        scale: s; the authors use 0.01 to 1 on GLUE, by task, and alpha / rank on language models.
        dropout: probability of dropping an input element on the way to the change, in [0, 1); the authors drop none.
    Raises:
        ValueError: if rank < 1 or depth < 0.
    """

    source = "arXiv:2410.01870"
    capabilities = frozenset({"grow", "ordered", "pattern"})
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
                f"rank={rank}, depth={depth}: NEAT has at least one unit; use rank >= 1 and depth >= 0."
            )
        self.scale = scale
        self.depth = depth
        self.activation = activation
        self.side = side
        self.dropout = nn.Dropout(dropout)
        d = self.shape[0 if side == "output" else 1]
        self.A = self.zeros(rank, d)
        self.B = self.zeros(d, rank)
        for name in self._square():
            self.register_parameter(name, self.zeros(rank, rank))
        for name in ("A", *self._square()):
            nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))

    @property
    def axes(self) -> Mapping[str, Mapping[str, int | tuple[int, ...]]]:  # type: ignore[override]
        return {"rank": {"A": 0, **dict.fromkeys(self._square(), (0, 1)), "B": 1}}

    def _square(self) -> list[str]:
        return [f"{kind}_{level}" for kind in "ED" for level in range(self.depth)]

    @property
    def weight(self) -> Tensor:
        W = self.base_weight
        if self.side == "input":
            return W + self.scale * (self.B @ self._network(self.A @ W.T)).T
        return W + self.scale * self.B @ self._network(self.A @ W)

    def product(self) -> tuple[Tensor, Tensor]:
        """The hidden layer is one of the factors."""
        H = self._network(self._read())
        return (self.scale * H.T, self.B.T) if self.side == "input" else (self.scale * self.B, H)

    def cost(self) -> Cost:
        (m, n), r = self.shape, len(self.A)
        width = n if self.side == "output" else m
        once = 2 * r * m * n + 4 * self.depth * r * r * width
        return Cost(flops=2 * r * (m + n), flops_once=once, kept=n + r)

    def _network(self, H: Tensor) -> Tensor:
        """A W, or A W^T -> the last hidden layer; both (r, the other side of W)."""
        f = ACTIVATIONS[self.activation]
        H = f(H)
        hidden = []
        for level in range(self.depth):
            hidden.append(H)
            H = f(getattr(self, f"E_{level}") @ H)
        for level in range(self.depth):
            H = f(getattr(self, f"D_{level}") @ H) + hidden.pop()
        return H

    def _read(self) -> Tensor:
        """A W, or A W^T for the input side."""

        if isinstance(self.base, Parameterization):  # what trains inside gets a gradient through it
            inner = self.base_weight.to(self.A.dtype)
            return self.A @ (inner.T if self.side == "input" else inner)

        def W() -> Tensor:
            # Of a bf16 weight the product is taken in bf16, like the layer's own.
            dtype = layers.dtype(self.base)
            dense = layers.dense(self.base, dtype if dtype == torch.bfloat16 else self.A.dtype)
            return dense.T if self.side == "input" else dense

        return _Read.apply(self.A, W)  # type: ignore[no-untyped-call, no-any-return]


class _Read(torch.autograd.Function):
    """A W of a frozen W, which is made dense again for the backward pass: of a half-precision or quantized one no copy is kept."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, W: Callable[[], Tensor]) -> Tensor:
        ctx.W = W
        ctx.dtype = A.dtype
        dense = W()
        return (A.to(dense.dtype) @ dense).to(A.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W = ctx.W()
        return (grads[0].to(W.dtype) @ W.T).to(ctx.dtype), None
