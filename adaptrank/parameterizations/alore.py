"""ALoRE: low-rank experts in hypercomplex form, summed and folded into the weight."""

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.ops import low_rank as products
from adaptrank.parameterizations.base import Cost, Parameterization


class ALoRE(Parameterization):
    """W' = W + s sum_k S_k kron (U_k V_k): a plain sum of K low-rank experts, each a small rule S_k over b x b blocks.

    With placement="pre" the module stands before the layer, as a residual: y = W (x + s D x) + bias, D = sum_k S_k kron (U_k V_k)
    square. It is folded in by re-parameterization, W' = W (I + s D). U starts at zero, so training starts at W.

    Source: arXiv:2412.08341. The paper puts modules in sequence, "pre"; "parallel" is the form of the other methods here. From the abstract:
        the sequence and the re-parameterization. Number and rank of experts, start, scale and biases of the paper are
        unverified; the defaults give the 0.15M parameters that its abstract states for ViT-B.
    Shapes: W (m, n), S (K, b, b), V (K, r, n/b), U (K, m/b, r); "pre" has U (K, n/b, r). Parameters: K (b^2 + r (m + n) / b).
    Args:
        rank: rank r of each expert.
        experts: number K of experts; in the paper K = blocks.
        blocks: b, must divide m and n.
        scale: s; searched for each task by the authors (second-hand).
        placement: "parallel" or "pre".
        dropout: probability of dropping an input element on the way to V, in [0, 1).
    Raises:
        ValueError: if blocks does not divide the layer, or rank or experts is out of range.
    """

    source = "arXiv:2412.08341"
    axes = {"experts": {"S": 0, "V": 0, "U": 0}, "rank": {"V": 1, "U": 2}}
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
            self.needs_weight()
            m = n
        if blocks < 1 or m % blocks or n % blocks:
            fits = [b for b in range(1, min(m, n) + 1) if m % b == n % b == 0]
            raise UserError(f"blocks={blocks} does not divide a {m}x{n} change; use one of {fits}.")
        self.most = min(m, n) // blocks
        if not 1 <= rank <= self.most or experts < 1:
            raise UserError(
                f"rank={rank}, experts={experts} with {blocks} blocks do not fit a {m}x{n} change; use ranks of 1 to {self.most}, "
                f"and 1 or more experts."
            )
        self.dropout = nn.Dropout(dropout)
        self.S = self.zeros(experts, blocks, blocks)
        self.V = self.zeros(experts, rank, n // blocks)
        self.U = self.zeros(experts, m // blocks, rank)
        nn.init.normal_(self.S, std=1 / math.sqrt(blocks))
        nn.init.uniform_(self.V, -math.sqrt(blocks / n), math.sqrt(blocks / n))

    @property
    def weight(self) -> Tensor:
        experts = (
            torch.kron(s.contiguous(), u @ v)
            for s, u, v in zip(self.S, self.U, self.V, strict=True)
        )
        D = self.scale * sum(experts, self.U.new_zeros(()))
        return self.base_weight + (self.base_weight @ D if self.placement == "pre" else D)

    def adapted(self, x: Tensor) -> Tensor:
        if self.multiplies(x):
            z, U = self._thin(x), self.scale * self.U.transpose(0, 1).flatten(1)
            if self.placement == "parallel":
                return self.accumulated(x, z, U)
            return self.base(products.accumulate(x, z, U))  # type: ignore[no-any-return]
        if self.placement == "parallel":
            return cast(Tensor, super().adapted(x))
        return self.base(x + self.delta(x.to(self.U.dtype), x).to(x.dtype))  # type: ignore[no-any-return]

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.linear(self._thin(x), self.U.transpose(0, 1).flatten(1)).flatten(-2)

    def _thin(self, x: Tensor) -> Tensor:
        """What the experts' U multiply, (..., b, K r), in the dtype of x."""
        X = self.dropped(x).reshape(
            *x.shape[:-1], self.S.shape[-1], self.V.shape[-1]
        )  # (..., b, n/b)
        z = F.linear(X, self.V.to(x.dtype).flatten(0, 1))
        z = z.view(*z.shape[:-1], *self.V.shape[:2])
        return torch.einsum("...ukr,kpu->...pkr", z, self.S.to(x.dtype)).flatten(-2)

    def cost(self) -> Cost:
        n, (K, rows, r), b = self.shape[1], self.U.shape, self.S.shape[1]
        return Cost(flops=2 * K * r * (n + b * b + rows * b), kept=n + 2 * K * r * b)

    def max_units(self, axis: str) -> int | None:
        return self.most if axis == "rank" else None
