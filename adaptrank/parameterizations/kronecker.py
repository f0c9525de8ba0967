"""Kronecker: a sum of Kronecker products beside a frozen weight."""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.ops import low_rank
from adaptrank.ops.products import contiguous, fresh_view, scaled_product
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.traits import StudiedRate


class Kronecker(Parameterization):
    """W' = W + s sum_k A_k kron B_k: a sum of r Kronecker products.

    A is the coarse factor, whose entries scale blocks of B's size. One product can already have
    full rank: rank(A kron B) = rank(A) rank(B). B starts at zero, so training starts at W.

    For few tokens or products, the change is A (B X) or (A X) B on the input as a matrix X,
    whichever is cheaper. From three products and max(m, n) / r tokens on, the change of a linear
    layer is built once a call, in one product of 2 r m n operations, and multiplies all tokens.
    There it was measured to be 1.6 to 2.4 times as fast, at 768 x 768 with r = 4 to 8.

    A side whose size is prime has no factors. Its A is then 1 wide, and B as wide as the layer. A
    warning says so if a product then has more numbers than a LoRA of rank one.

    Source: KronA, arXiv:2212.10650, which is the case r = 1 with a tuned s. Only its abstract was
        read. The balanced factors are the rule of LoKr in HF PEFT and LyCORIS. One product is LoKr
        in LyCORIS with whole factors, start and scale included.
    Shapes: W (m, n), A (r, m1, n1), B (r, m2, n2), with m = m1 m2 and n = n1 n2. For a convolution,
        n1 divides the channels. Parameters: r (m1 n1 + m2 n2).
    Args:
        rank: number r of products.
        factor: m1 and n1 are the largest divisors up to it. -1 makes m1 <= m2 and n1 <= n2 as equal
            as possible.
        scale: s.
        dropout: probability of dropping an input element on the way to the products, in [0, 1).
    Raises:
        ValueError: if rank < 1, or factor is neither -1 nor positive.
    """

    source = "arXiv:2212.10650"
    accepts = layers.MATRICES
    axes = {"rank": {"A": 0, "B": 0}}
    studied_rate = StudiedRate(2e-3, "docs/results/study_methods_at_defaults.md")
    reads_blocks = True

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 4,
        factor: int = -1,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        if rank < 1:
            raise UserError(f"rank={rank}: a Kronecker has at least one product; use rank >= 1.")
        (m, n), plain = self.shape, self.innermost
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        inputs = plain.in_channels if isinstance(plain, nn.Conv2d) else n
        m1, n1 = divisor(m, factor), divisor(inputs, factor)
        m2, n2 = m // m1, n // n1
        # Two classes, or three colours, have nothing to divide.
        is_prime = (m1 == 1 and m > 3) or (n1 == 1 and inputs > 3)
        if factor != 1 and is_prime and m1 * n1 + m2 * n2 > m + n:
            warnings.warn(
                f"Kronecker on a {m}x{n} layer: with factor={factor} A is {m1}x{n1} and B "
                f"{m2}x{n2}, {m1 * n1 + m2 * n2:,} numbers a product where a LoRA has {m + n:,} a "
                f"rank; leave the layer out, or use LoRA there.",
                stacklevel=2,
            )
        self.A, self.B = self.zeros(rank, m1, n1), self.zeros(rank, m2, n2)
        nn.init.uniform_(self.A, -1 / math.sqrt(n1), 1 / math.sqrt(n1))

    @formula
    def weight(self) -> Tensor:
        B = self.gated("B")
        terms = (torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(self.A, B, strict=True))
        return self.base_weight + self.scale * sum(terms, B.new_zeros(()))

    def forward_adapted(self, x: Tensor) -> Tensor:
        if not self._builds_change(x):
            return super().forward_adapted(x)
        A, B = self.A, self.gated("B")
        change = _Sum.apply(A, B, self.scale, x.dtype)  # type: ignore[no-untyped-call]
        plain = low_rank.plain(self.base, x.dtype) if self.apply_dropout(x) is x else None
        if plain is None or not low_rank.fits(x):
            return self.base(x) + F.linear(self.dropout(x), change)  # type: ignore[no-any-return]
        if x.dtype == A.dtype:
            return F.linear(x, plain[0] + change, plain[1])
        # In half precision W + change would round a small change in the same way for all tokens. It
        # gets a product of its own.
        return _TwoProducts.apply(x, *plain, change)  # type: ignore[no-untyped-call, no-any-return]

    def _builds_change(self, x: Tensor) -> bool:
        """Return whether to build the change (m, n) for this input, as many tokens share it."""
        r = len(self.A)
        if not isinstance(self.innermost, layers.LINEAR) or r < 3:
            return False
        return r * (x.numel() // x.shape[-1]) >= max(self.shape)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        plain, A, B = self.innermost, self.A, self.gated("B")
        n1, n2 = A.shape[2], B.shape[2]
        if isinstance(plain, nn.Embedding):
            # The column of a Kronecker product is the product of columns.
            a, b = A.permute(2, 0, 1)[x // n2], B.permute(2, 0, 1)[x % n2]
            return self.scale * torch.einsum("...kp,...kq->...pq", a, b).flatten(-2)
        x = self.dropout(x)
        if isinstance(plain, nn.Conv2d):
            # B convolves each group of channels, and A mixes the groups.
            kernels = B.reshape(-1, plain.in_channels // n1, *plain.kernel_size)
            groups = x.reshape(-1, kernels.shape[1], *x.shape[-2:])
            z = plain._conv_forward(groups, kernels, None)
            z = z.reshape(*x.shape[:-3], n1, *B.shape[:2], *z.shape[-2:])
            return self.scale * torch.einsum("...ukqhw,kpu->...hwpq", z, A).flatten(-2)
        X = x.reshape(*x.shape[:-1], n1, n2)
        if self._coarse_first():
            z = torch.einsum("...uv,kpu->...kpv", X, A)
            return self.scale * torch.einsum("...kpv,kqv->...pq", z, B).flatten(-2)
        z = torch.einsum("...uv,kqv->...ukq", X, B)
        return self.scale * torch.einsum("...ukq,kpu->...pq", z, A).flatten(-2)

    def _coarse_first(self) -> bool:
        """Return whether it is cheaper to multiply an input by A before B."""
        (_, m1, n1), (_, m2, n2) = self.A.shape, self.B.shape
        return n2 * m1 * (n1 + m2) < n1 * m2 * (n2 + m1)

    def cost(self) -> Cost:
        # For few tokens. For many it is 2 m n for each token, and 2 r m n once.
        (r, m1, n1), (_, m2, n2) = self.A.shape, self.B.shape
        if self._coarse_first():
            return Cost(flops=2 * r * n2 * m1 * (n1 + m2), kept=n1 * n2 + r * m1 * n2)
        return Cost(flops=2 * r * n1 * m2 * (n2 + m1), kept=n1 * n2 + r * n1 * m2)


class _Sum(torch.autograd.Function):
    """(A, B, s) -> s sum_k A_k kron B_k as a matrix (m, n) of some dtype, in two operations."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(A, B)
        ctx.scale = scale
        (_, m1, n1), (_, m2, n2) = A.shape, B.shape
        products = scaled_product(A.flatten(1).T, B.flatten(1), scale, A[0, :1, :1])
        blocks = products.view(m1, n1, m2, n2).transpose(1, 2)
        return contiguous(blocks, dtype).view(m1 * m2, n1 * n2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (A, B) = grads, ctx.saved_tensors
        (_, m1, n1), (_, m2, n2) = A.shape, B.shape
        blocks = g.reshape(m1, m2, n1, n2).transpose(1, 2)
        blocks = contiguous(blocks, A.dtype).view(m1 * n1, m2 * n2)
        grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_A = scaled_product(B.flatten(1), blocks.T, ctx.scale, A[0, :1, :1]).view_as(A)
        if ctx.needs_input_grad[1]:
            grad_B = scaled_product(A.flatten(1), blocks, ctx.scale, A[0, :1, :1]).view_as(B)
        return grad_A, grad_B, None, None


class _TwoProducts(torch.autograd.Function):
    """(x, W, bias, D) -> W x + bias + D x, for a frozen W and a change D of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, D: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, D)
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, W, bias)
        torch.addmm(y, rows, D.T, out=y)
        return fresh_view(y, (*x.shape[:-1], len(W)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, W, D) = grads, ctx.saved_tensors
        rows = g.reshape(-1, len(W))
        grad_x = grad_D = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addmm(rows @ W, rows, D).view(x.shape)
        if ctx.needs_input_grad[3]:
            grad_D = rows.T @ x.reshape(-1, x.shape[-1])
        return grad_x, None, None, grad_D


def divisor(size: int, factor: int) -> int:
    """Return the largest divisor of `size` up to `factor`.

    For -1 it is the largest divisor up to the square root, so that it and its partner are as equal
    as possible.

    Raises:
        ValueError: if factor is neither -1 nor positive.
    """
    if factor < 1 and factor != -1:
        raise UserError(
            f"factor={factor}: use -1 for factors as equal as possible, or a positive number."
        )
    largest = math.isqrt(size) if factor == -1 else min(factor, size)
    return next(d for d in range(largest, 0, -1) if size % d == 0)
