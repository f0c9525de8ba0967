"""The norms of the rows of W + s B A, and a linear layer whose rows have trained norms."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrank.ops.products import as_gradient, scaled_product, traceable_scale, transposed
from adaptrank.ops.scaling import scaled_rows, sum_of_products
from adaptrank.ops.second_derivatives import differentiable_gradients


def row_norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return ||V_j|| for each row j of V = W + s B A, (m,).

    ||V_j||^2 = ||W_j||^2 + s (2 W A^T + s B A A^T)_j B_j. No product is of the size of W. The one
    with W is taken in its dtype, and everything else in the dtype of `squares`.

    Args:
        W: (m, n).
        squares: ||W_j||^2, (m,).
        A: (r, n).
        B: (m, r).
        s: the scale.
    """
    B, s = traceable_scale(B, s)
    device = W.device.type
    # Autocast would round the sums. The meta device has no autocast.
    can_autocast = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if can_autocast else nullcontext():
        return _row_norms(squares, W @ A.to(W.dtype).T, A, B, s)


def _row_norms(squares: Tensor, cross: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return the norms from W A^T, (m, r)."""
    A, B, cross = A.to(squares.dtype), B.to(squares.dtype), cross.to(squares.dtype)
    written = None if torch.is_grad_enabled() else cross
    change = torch.addmm(cross, B, A @ A.T, beta=2, alpha=s, out=written)
    squared = torch.baddbmm(squares[:, None, None], change[:, None], B[..., None], alpha=s)
    # Rounding may leave a negative number, and a row of zeros stays a row of zeros.
    return squared.view(-1).clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    squares: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    s: float,
) -> Tensor:
    """Return diag(magnitude / ||V||) V x + bias with V = W + s B A, in one autograd step.

    The norms are constants for the gradient.

    Args:
        x: (..., n), in the dtype of W.
        W: (m, n), frozen.
        bias: (m,), frozen, or None.
        squares: ||W_j||^2, (m,), frozen.
        A: (r, n), in the adapter's dtype.
        B: (m, r), in the adapter's dtype.
        magnitude: (m,), in the adapter's dtype.
        s: the scale.
    """
    B, s = traceable_scale(B, s)
    return _Linear.apply(x, W, bias, squares, A, B, magnitude, s)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    """Autograd function that keeps x, A x, and the output before its scale.

    A model may change the scaled output in place. It cannot reach the one that is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        squares: Tensor,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        s: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        A_rounded = A.to(x.dtype)
        Bt_rounded = transposed(B, x.dtype)
        hidden = F.linear(rows, A_rounded)
        y = F.linear(rows, W, bias)
        torch.addmm(y, hidden, Bt_rounded, alpha=s, out=y)
        norms = _row_norms(squares, W @ A_rounded.T, A, B, s)
        # The bias is subtracted inside the deviation, so that 1 is the identity to the bit.
        deviation = (magnitude / norms - 1).to(x.dtype)
        ctx.save_for_backward(x, W, bias, A, B, magnitude, norms, hidden, y)
        ctx.rounded, ctx.s = (A_rounded, Bt_rounded, deviation), s
        return scaled_rows(y.view(*x.shape[:-1], len(B)), deviation, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), s = grads, ctx.s
        x, W, bias, A, B, magnitude, norms, hidden, y = ctx.saved_tensors
        needs_x, _, _, _, needs_A, needs_B, needs_magnitude, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = (x, W, bias, norms, A, B, magnitude)
            needed = ctx.needs_input_grad[:-1]
            return *differentiable_gradients(partial(_formula, s=s), inputs, needed, g), None
        A_rounded, Bt_rounded, deviation = ctx.rounded
        rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        grad_x = grad_A = grad_B = grad_magnitude = None
        if needs_magnitude:
            grad_magnitude = sum_of_products(g, y, norms.dtype, bias) / norms
        if needs_x or needs_A or needs_B:
            g = torch.addcmul(g, g, deviation)
        if needs_B:
            grad_B = as_gradient(scaled_product(hidden.T, g, s, W[:1, :1]).T, B)
        if needs_x or needs_A:
            grad_hidden = scaled_product(g, Bt_rounded.T, s, W[:1, :1])
            if needs_A:
                grad_A = as_gradient(grad_hidden.T @ rows, A)
            if needs_x:
                grad_x = g @ W
                torch.addmm(grad_x, grad_hidden, A_rounded, out=grad_x)
                grad_x = grad_x.view(x.shape)
        return grad_x, None, None, None, grad_A, grad_B, grad_magnitude, None


def _formula(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    norms: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    s: float,
) -> Tensor:
    y = F.linear(x, W) + s * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
    y = y * (magnitude / norms).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)
