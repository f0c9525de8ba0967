"""Add a Kronecker product of thin factors to a linear layer, in one autograd step.

A token is a matrix X (n1, n2), and A kron (B1 B2) maps it to A X B2^T B1^T, (m1, m2). The factors
are applied from the inside out: B2, A, B1.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrank.ops.products import (
    as_gradient,
    fresh_view,
    scaled_product,
    traceable_scale,
    transposed,
)
from adaptrank.ops.second_derivatives import differentiable_gradients


def linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B1: Tensor, B2: Tensor, s: float
) -> Tensor:
    """Return W x + bias + s (A kron (B1 B2)) x.

    Args:
        x: (..., n), in the dtype of W.
        W: (m, n), frozen.
        bias: (m,), frozen, or None.
        A: (m1, n1), in the adapter's dtype.
        B1: (m2, r), in the adapter's dtype.
        B2: (r, n2), in the adapter's dtype.
        s: the scale.
    """
    B1, s = traceable_scale(B1, s)
    return _Linear.apply(x, W, bias, A, B1, B2, s)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    """Autograd function that keeps x, X B2^T transposed, and A X B2^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B1: Tensor,
        B2: Tensor,
        s: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        (m1, n1), (m2, r), n2 = A.shape, B1.shape, B2.shape[1]
        N = len(rows)
        A_rounded, B2_rounded = A.to(x.dtype), B2.to(x.dtype)
        B1t_rounded = transposed(B1, x.dtype)
        X = rows.view(N, n1, n2)
        inner = _on_blocks(B2_rounded, X, 1.0, W)
        middle = torch.bmm(A_rounded.expand(N, m1, n1), inner.mT)
        y = F.linear(rows, W, bias)
        blocks = y.view(N * m1, m2)
        torch.addmm(blocks, middle.view(N * m1, r), B1t_rounded, alpha=s, out=blocks)
        ctx.save_for_backward(x, W, bias, A, B1, B2, inner, middle)
        ctx.rounded, ctx.s = (A_rounded, B1t_rounded, B2_rounded), s
        return fresh_view(y, (*x.shape[:-1], m1 * m2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), s = grads, ctx.s
        x, W, bias, A, B1, B2, inner, middle = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B1, needs_B2, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs, needed = (x, W, bias, A, B1, B2), ctx.needs_input_grad[:-1]
            return *differentiable_gradients(partial(_formula, s=s), inputs, needed, g), None
        A_rounded, B1t_rounded, B2_rounded = ctx.rounded
        rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, len(W))
        (m1, n1), (m2, r), n2 = A.shape, B1.shape, B2.shape[1]
        N = len(rows)
        blocks = g.reshape(N * m1, m2)
        grad_x = grad_A = grad_B1 = grad_B2 = None
        if needs_B1:
            product = scaled_product(middle.view(N * m1, r).T, blocks, s, W[:1, :1])
            grad_B1 = as_gradient(product.T, B1)
        if needs_x or needs_A or needs_B2:
            grad_middle = _on_blocks(B1t_rounded, blocks.view(N, m1, m2), s, W)
            if needs_A:
                product = grad_middle.reshape(N * r, m1).T @ inner.reshape(N * r, n1)
                grad_A = as_gradient(product, A)
        if needs_x or needs_B2:
            grad_inner = torch.bmm(A_rounded.T.expand(N, n1, m1), grad_middle.mT).view(N * n1, r)
            if needs_B2:
                grad_B2 = as_gradient(grad_inner.T @ rows.reshape(N * n1, n2), B2)
            if needs_x:
                grad_x = g @ W
                parts = grad_x.view(N * n1, n2)
                torch.addmm(parts, grad_inner, B2_rounded, out=parts)
                grad_x = grad_x.view(x.shape)
        return grad_x, None, None, grad_A, grad_B1, grad_B2, None


def _on_blocks(factor: Tensor, blocks: Tensor, s: float, like: Tensor) -> Tensor:
    """Return s factor @ block for the blocks of each token, (N, r, b).

    A product for each token gives the layout that the gradient of A reads. In bf16 on a CPU it was
    measured to take a fifth longer than one product and a copy, and the products with A 1.7 times
    as long as with the other layout.

    Args:
        factor: (r, k).
        blocks: (N, b, k).
        s: the scale.
        like: as in `scaled_product`.
    """
    (N, b, k), r = blocks.shape, len(factor)
    if blocks.device.type == "cpu" and blocks.dtype == torch.bfloat16:
        return scaled_product(blocks.reshape(N * b, k), factor.T, s, like[:1, :1]).view(N, b, r).mT
    return torch.baddbmm(like[:1, :1], factor.expand(N, r, k), blocks.mT, beta=0, alpha=s)


def _formula(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B1: Tensor, B2: Tensor, s: float
) -> Tensor:
    X = x.reshape(*x.shape[:-1], A.shape[1], B2.shape[1])
    A, B1, B2 = A.to(x.dtype), B1.to(x.dtype), B2.to(x.dtype)
    change = s * F.linear(A @ F.linear(X, B2), B1).flatten(-2)
    return F.linear(x, W, None if bias is None else bias.to(x.dtype)) + change
