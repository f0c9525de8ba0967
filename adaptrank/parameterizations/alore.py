"""ALoRE: low-rank experts in hypercomplex form, summed and folded into the weight."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.ops import low_rank
from adaptrank.ops.products import contiguous
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.traits import StudiedRate


class ALoRE(Parameterization):
    """W' = W + s sum_k S_k kron (U_k V_k): a plain sum of K low-rank experts.

    Each expert has a small rule S_k over b x b blocks. With placement="pre" the module stands
    before the layer, as a residual: y = W (x + s D x) + bias, with D = sum_k S_k kron (U_k V_k)
    square. It is folded in by re-parameterization, W' = W (I + s D). U starts at zero, so training
    starts at W.

    Source: arXiv:2412.08341. The paper puts modules in sequence, "pre". "parallel" is the form of
        the other methods here. The sequence and the re-parameterization are from the abstract.
        Number and rank of experts, start, scale and biases of the paper are unverified. The
        defaults give the 0.15M parameters that its abstract states for ViT-B.
    Shapes: W (m, n), S (K, b, b), V (K, r, n/b), U (K, m/b, r). "pre" has U (K, n/b, r).
        Parameters: K (b^2 + r (m + n) / b).
    Args:
        rank: rank r of each expert.
        experts: number K of experts. In the paper K = blocks.
        blocks: b, must divide m and n.
        scale: s. The authors search it for each task (second-hand).
        placement: "parallel" or "pre".
        dropout: probability of dropping an input element on the way to V, in [0, 1).
    Raises:
        ValueError: if blocks does not divide the layer, or rank or experts is out of range.
    """

    source = "arXiv:2412.08341"
    axes = {"experts": {"S": 0, "V": 0, "U": 0}, "rank": {"V": 1, "U": 2}}
    studied_rate = StudiedRate(2e-3, "docs/results/study_methods_at_defaults.md")
    reads_blocks = True

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 4,
        experts: int = 4,
        blocks: int = 4,
        scale: float = 1.0,
        placement: Literal["parallel", "pre"] = "parallel",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if placement not in ("parallel", "pre"):
            raise UserError(f"placement={placement!r} is unknown; use 'parallel' or 'pre'.")
        self.placement, self.scale = placement, scale
        if placement == "pre":
            self.require_weight()
            m = n
        if blocks < 1 or m % blocks or n % blocks:
            fits = [b for b in range(1, min(m, n) + 1) if m % b == n % b == 0]
            raise UserError(f"blocks={blocks} does not divide a {m}x{n} change; use one of {fits}.")
        self.largest_rank = min(m, n) // blocks
        if not 1 <= rank <= self.largest_rank or experts < 1:
            raise UserError(
                f"rank={rank}, experts={experts} with {blocks} blocks do not fit a {m}x{n} change; "
                f"use ranks of 1 to {self.largest_rank}, and 1 or more experts."
            )
        self.dropout = nn.Dropout(dropout)
        self.S = self.zeros(experts, blocks, blocks)
        self.V = self.zeros(experts, rank, n // blocks)
        self.U = self.zeros(experts, m // blocks, rank)
        nn.init.normal_(self.S, std=1 / math.sqrt(blocks))
        nn.init.uniform_(self.V, -math.sqrt(blocks / n), math.sqrt(blocks / n))

    @formula
    def weight(self) -> Tensor:
        U = self.gated("U")
        experts = (
            torch.kron(s.contiguous(), u @ v) for s, u, v in zip(self.S, U, self.V, strict=True)
        )
        D = self.scale * sum(experts, U.new_zeros(()))
        return self.base_weight + (self.base_weight @ D if self.placement == "pre" else D)

    def forward_adapted(self, x: Tensor) -> Tensor:
        if self.fuses(x):
            z, U = self._hidden(x), self._output_factor(x.dtype)
            if self.placement == "parallel":
                return self.add_low_rank(x, z, U, self.scale)
            return self.base(low_rank.accumulate(x, z, U, scale=self.scale))  # type: ignore[no-any-return]
        if self.placement == "parallel":
            return super().forward_adapted(x)
        return self.base(x + self.delta(x.to(self.U.dtype), x).to(x.dtype))  # type: ignore[no-any-return]

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self._hidden(x)
        return self.scale * F.linear(hidden, self._output_factor(hidden.dtype)).flatten(-2)

    def _hidden(self, x: Tensor) -> Tensor:
        """Return what U multiplies, (..., b, K r), in the dtype of x."""
        blocks, width = self.S.shape[-1], self.V.shape[-1]
        X = self.apply_dropout(x).reshape(*x.shape[:-1], blocks, width)  # (..., b, n/b)
        z = F.linear(X, self.V.to(x.dtype).flatten(0, 1))
        # The rule of an expert stands on the left, so that its gradient has its own layout.
        K, r, _ = self.V.shape
        N = x.shape[:-1].numel()
        z = z.view(N, blocks, K, r).permute(2, 1, 0, 3).reshape(K, blocks, N * r)
        z = torch.bmm(self.S.to(x.dtype), z)
        z = z.view(K, blocks, N, r).permute(2, 1, 0, 3)
        return z.reshape(*x.shape[:-1], blocks, K * r)

    def _output_factor(self, dtype: torch.dtype) -> Tensor:
        """Return U of all experts side by side, (m/b, K r)."""
        return contiguous(self.gated("U").mT, dtype).flatten(0, 1).T

    def cost(self) -> Cost:
        n, (K, rows, r), b = self.shape[1], self.U.shape, self.S.shape[1]
        return Cost(flops=2 * K * r * (n + b * b + rows * b), kept=n + 2 * K * r * b)

    def max_units(self, axis: str) -> int | None:
        return self.largest_rank if axis == "rank" else None
