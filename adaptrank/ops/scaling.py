"""Scale the inputs, the outputs, or both, of a linear layer in one autograd step each.

The scale is given as its deviation d from 1, and the deviation is what is rounded to the dtype of
the activations. Near 1, half precision would lose a small deviation. Nothing is divided by a scale,
so one near zero needs no guard.

A folded weight diag(1 + da) W diag(1 + dc) was measured on a CPU against `linear`, as time over
that of the frozen layer. In float32 it was 1.06 against 1.15 for 4096 tokens of 576 numbers, and
1.03 against 1.11 for 1024 tokens of 2048. In bf16 they were equal. It is not used. Its scales
divide their gradients, which fails near zero. It keeps its own output, which the model may
overwrite. And it needs at least two kernels more, for the scales and the divisions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrank.ops.second_derivatives import differentiable_gradients


def scale_input(x: Tensor, d: Tensor) -> Tensor:
    """Return x (1 + d), for x (..., n) and d (n,)."""
    _check_width(x, d)
    return _ScaleInput.apply(x, d)  # type: ignore[no-any-return, no-untyped-call]


def scale_output(y: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    """Return y + d (y - bias), for y (..., m), d (m,) and bias (m,).

    This scales the rows of a weight by 1 + d and leaves the bias alone.
    """
    return _ScaleOutput.apply(y, d, bias)  # type: ignore[no-any-return, no-untyped-call]


def linear(x: Tensor, W: Tensor, bias: Tensor | None, da: Tensor, dc: Tensor) -> Tensor:
    """Return diag(1 + da) W diag(1 + dc) x + bias.

    Args:
        x: (..., n), in the dtype of W.
        W: (m, n), frozen.
        bias: (m,), frozen, or None.
        da: (m,), deviations of the row scales.
        dc: (n,), deviations of the column scales.
    """
    _check_width(x, dc)
    return _Linear.apply(x, W, bias, da, dc)  # type: ignore[no-any-return, no-untyped-call]


def _check_width(x: Tensor, d: Tensor) -> None:
    """Refuse an input (..., 1) of a layer with n inputs, which a product would broadcast.

    Raises:
        ValueError: naming the shape, and what the layer reads.
    """
    if x.shape[-1] != d.shape[0]:
        raise ValueError(
            f"The layer reads {d.shape[0]} numbers at each position, channels last, and the input "
            f"has the shape {tuple(x.shape)}."
        )


class _ScaleInput(torch.autograd.Function):
    """x (1 + d). It keeps only x, which other projections of the same input keep anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(x, d)
        ctx.rounded = d.to(x.dtype)
        return torch.addcmul(x, x, ctx.rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, d) = grads, ctx.saved_tensors
        rounded = d.to(g.dtype) if torch.is_grad_enabled() else ctx.rounded
        grad_x = torch.addcmul(g, g, rounded) if ctx.needs_input_grad[0] else None
        grad_d = sum_of_products(g, x, d.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_d


class _ScaleOutput(torch.autograd.Function):
    """y + d (y - bias). It keeps y, and not its own output, which the model may overwrite."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, d, bias)
        ctx.rounded = d.to(y.dtype)
        return scaled_rows(y, ctx.rounded, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (y, d, bias) = grads, ctx.saved_tensors
        rounded = d.to(g.dtype) if torch.is_grad_enabled() else ctx.rounded
        grad_y = torch.addcmul(g, g, rounded) if ctx.needs_input_grad[0] else None
        grad_d = sum_of_products(g, y, d.dtype, bias) if ctx.needs_input_grad[1] else None
        grad_bias = None
        # A method inside of this one may train the bias.
        if ctx.needs_input_grad[2]:
            total = g.reshape(-1, g.shape[-1]).sum(0, dtype=bias.dtype)
            grad_bias = -d.to(bias.dtype) * total
        return grad_y, grad_d, grad_bias


class _Linear(torch.autograd.Function):
    """diag(1 + da) W diag(1 + dc) x + bias. It keeps x and the output before its scale."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, da: Tensor, dc: Tensor
    ) -> Tensor:
        da_rounded, dc_rounded = da.to(x.dtype), dc.to(x.dtype)
        y = F.linear(torch.addcmul(x, x, dc_rounded), W, bias)
        ctx.save_for_backward(x, W, bias, da, dc, y)
        ctx.rounded = da_rounded, dc_rounded
        return scaled_rows(y, da_rounded, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, W, bias, da, dc, y) = grads, ctx.saved_tensors
        needs_x, _, _, needs_da, needs_dc = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = (x, W, bias, da, dc)
            return differentiable_gradients(_formula, inputs, ctx.needs_input_grad, g)
        da_rounded, dc_rounded = ctx.rounded
        grad_x = grad_da = grad_dc = None
        zeros = _zeros(g, max(W.shape)) if g.device.type == "cpu" else None
        if needs_da:
            grad_da = sum_of_products(g, y, da.dtype, bias, zeros)
        if needs_x or needs_dc:
            grad_scaled = torch.addcmul(g, g, da_rounded) @ W
            if needs_dc:
                grad_dc = sum_of_products(grad_scaled, x, dc.dtype, None, zeros)
            if needs_x:
                grad_x = torch.addcmul(grad_scaled, grad_scaled, dc_rounded, out=grad_scaled)
        return grad_x, None, None, grad_da, grad_dc


def _formula(x: Tensor, W: Tensor, bias: Tensor | None, da: Tensor, dc: Tensor) -> Tensor:
    y = F.linear(x + x * dc.to(x.dtype), W)
    y = y + y * da.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def scaled_rows(y: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    """Return y + d (y - bias), for d in the dtype of y."""
    return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), d)


def sum_of_products(
    g: Tensor,
    z: Tensor,
    dtype: torch.dtype,
    offset: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """Return the sum of g (z - offset) over all leading dimensions, (n,): the gradient of a scale.

    On a CPU it is the gradient of the gain of batch normalization with fixed statistics. That is
    one pass over g and z with sums in float32. A product and its sum took 1.5 times as long in
    float32 and 1.6 to 2 times in bf16, where they had an error of 2e-3 instead of 3e-7 (1024 tokens
    of 2048 numbers).

    Args:
        g: (..., n).
        z: (..., n).
        dtype: dtype of the result.
        offset: (n,), or None for zero.
        zeros: at least n zeros that a CPU may read, in float32 or better, or None to make them.
    """
    g, z = g.reshape(-1, g.shape[-1]), z.reshape(-1, z.shape[-1])
    if not _in_one_pass(g, z):
        return (g * (z if offset is None else z - offset.to(z.dtype))).sum(0, dtype=dtype)
    zeros = _zeros(g, g.shape[1]) if zeros is None else zeros[: g.shape[1]]
    # The kernel reads the mean as if it were contiguous.
    mean = zeros if offset is None else offset.to(zeros.dtype).contiguous()
    # A variance of zero and an epsilon of one divide by one.
    _, total, _ = torch.ops.aten.native_batch_norm_backward(
        _as_image(g), _as_image(z), zeros, mean, zeros, None, None, False, 1.0, [False, True, False]
    )
    return total.to(dtype)  # type: ignore[no-any-return]


def _in_one_pass(g: Tensor, z: Tensor) -> bool:
    """Return whether the kernel of batch normalization is faster: on a CPU, outside of a graph."""
    if g.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if type(g) is not Tensor or g.dtype != z.dtype or not g.numel():
        return False
    return g.is_contiguous() and z.is_contiguous()


def _zeros(like: Tensor, size: int) -> Tensor:
    """Return zeros in float32 or better, as statistics of `like`."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_zeros(size, dtype=exact)


def _as_image(rows: Tensor) -> Tensor:
    """Return (N, n) as one image of N pixels with n channels, channels last in memory."""
    return rows.T[None, :, None]
