"""y + U V x, what a thin product adds to a linear layer, and scales of its inputs and outputs: what most methods compute with.

Written with autograd's operations, a thin product costs more in what surrounds it than in itself: a copy of the input in the
adapter's dtype, a scaled copy of the change, one to add it, and the same again for the gradient. Here the change is accumulated
into the output by the product itself, and the gradient of the input into that of the frozen product.

Over a bf16 layer the products are taken in bf16, as the layer's own are: the input is bf16 already, and the sum is rounded to bf16 in any
case. U, V and their gradients are float32 outside of the products. A change below 2^-8 of what the layer puts out is lost in that
rounding in part, here as wherever an adapter's output is added to a bf16 layer's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptrank import layers

_GROUPS = 8
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
)  # float16 would overflow in a gradient summed over tokens


def fits(x: Tensor) -> bool:
    """Whether products over this input are taken here: of numbers in a dtype that is safe to sum in, and without autocast."""
    device = x.device.type
    knows = torch.amp.is_autocast_available(device)  # the meta device knows none
    return x.dtype in _DTYPES and not (knows and torch.is_autocast_enabled(device))


def plain(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(W (m, n), bias) of a linear layer that nobody would notice is not called; None of any other.

    It has no hook, no forward in place of its own, nothing that trains, and nothing quantized or sharded.
    """
    if type(layer) not in layers.LINEAR or "forward" in vars(layer):
        return None
    if (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    ):
        return None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if (
        weight is None
        or type(weight) is not nn.Parameter
        or not weight.is_floating_point()
        or weight.requires_grad
    ):
        return None
    if bias is not None and bias.requires_grad:
        return None
    return (weight.T if type(layer) is Conv1D else weight), bias


def linear(x: Tensor, W: Tensor, bias: Tensor | None, U: Tensor, V: Tensor) -> Tensor:
    """W x + bias + U V x.

    Args:
        x: (..., n), in the dtype of W.
        W: (m, n), frozen.
        bias: (m,), frozen, or None.
        U: (m, k), in the adapter's dtype.
        V: (k, n), in the adapter's dtype.
    """
    return _Linear.apply(x, W, bias, U, V)[0]  # type: ignore[no-any-return, no-untyped-call]


def accumulate(y: Tensor, z: Tensor, U: Tensor, fresh: bool = False) -> Tensor:
    """y + U z, block by block of y where z has some.

    Args:
        y: (..., m).
        z: (..., k), or (..., b, k) where y is b blocks; in the dtype of y.
        U: (m, k), or (m / b, k), in the adapter's dtype.
        fresh: nobody else holds y, and nothing has been kept of it: it is written to.
    """
    return _Accumulate.apply(y, z, U, fresh)  # type: ignore[no-any-return, no-untyped-call]


def scale_input(x: Tensor, d: Tensor) -> Tensor:
    """x (1 + d), of x (..., n) and d (n,)."""
    return _ScaleInput.apply(x, d)  # type: ignore[no-any-return, no-untyped-call]


def scale_output(y: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    """y + d (y - bias), of y (..., m), d and bias (m,): the rows of a weight scaled by 1 + d, and the bias left alone."""
    return _ScaleOutput.apply(y, d, bias)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    """(x, W, bias, U, V) -> (W x + bias + U z, z = V x). z is an output so that it has a second derivative; nobody else reads it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, U: Tensor, V: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        Vh, Ut = V.to(x.dtype), _columns(U, x.dtype)
        z = F.linear(rows, Vh)
        out = _add_product(F.linear(rows, W, bias), z, Ut)
        ctx.set_materialize_grads(False)
        _, _, _, of_U, of_V = ctx.needs_input_grad
        ctx.save_for_backward(
            W, *((U, z) if of_U else (None, None)), *((V, x) if of_V else (None, None))
        )
        ctx.shape, ctx.rounded = x.shape, (Ut, Vh)
        return out.view(*x.shape[:-1], out.shape[-1]), z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, gz = grads
        W, U, z, V, x = ctx.saved_tensors
        of_x, _, _, of_U, of_V = ctx.needs_input_grad
        Ut, Vh = ctx.rounded
        if torch.is_grad_enabled():  # of a second derivative they are variables
            Ut, Vh = Ut if U is None else U.T.to(Ut.dtype), Vh if V is None else V.to(Vh.dtype)
        gx = gU = gV = u = None
        if g is not None:
            rows = g.reshape(-1, g.shape[-1])
            if of_x or of_V:
                u = F.linear(rows, Ut)
            if of_U:
                gU = (z.T @ rows).T.to(U.dtype)
        if gz is not None:  # of a second derivative only
            u = gz if u is None else u + gz
        if of_V and u is not None:
            gV = (u.T @ x.reshape(-1, x.shape[-1])).to(V.dtype)
        if of_x and u is not None:
            gx = (u @ Vh if g is None else _add_product(rows @ W, u, Vh)).view(ctx.shape)
        return gx, None, None, gU, gV


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, U: Tensor, fresh: bool) -> Tensor:
        Ut = _columns(U, y.dtype)
        total = y.reshape(-1, Ut.shape[1])
        left = z.reshape(len(total), Ut.shape[0])
        ctx.save_for_backward(z, U)
        ctx.rounded = Ut
        if fresh:
            ctx.mark_dirty(y)
            _add_product(total, left, Ut)
            return y
        return torch.addmm(total, left, Ut).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (z, U) = grads, ctx.saved_tensors
        of_y, of_z, of_U, _ = ctx.needs_input_grad
        rows = g.reshape(-1, U.shape[0])
        Ut = U.T.to(g.dtype) if torch.is_grad_enabled() else ctx.rounded
        gz = F.linear(rows, Ut).view(z.shape) if of_z else None
        gU = (z.reshape(len(rows), U.shape[1]).T @ rows).T.to(U.dtype) if of_U else None
        return g if of_y else None, gz, gU, None


class _ScaleInput(torch.autograd.Function):
    """x (1 + d), keeping only x, which other projections of the same input keep anyway.

    The deviation is rounded to the dtype of x, not 1 + d: near 1 half precision would lose it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(x, d)
        return torch.addcmul(x, x, d.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, d) = grads, ctx.saved_tensors
        grad_x = torch.addcmul(g, g, d.to(g.dtype)) if ctx.needs_input_grad[0] else None
        grad_d = _sum_to(g * x, d) if ctx.needs_input_grad[1] else None
        return grad_x, grad_d


class _ScaleOutput(torch.autograd.Function):
    """y + d (y - b), keeping only its own output where y can be had back from it.

    With z = y - b, the gradient of d is sum(g z), and without a bias z = out / (1 + d). The next operation usually keeps
    `out` already. A bias would leave the rounding of `out` in z, and a scale near 0 may be
    0 in half precision: both keep y instead.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
        z = y if bias is None else y - bias.to(y.dtype)
        out = torch.addcmul(y, z, d.to(y.dtype))
        ctx.invertible = (
            bias is None and ctx.needs_input_grad[1] and not bool(((1 + d).abs() < 0.1).any())
        )
        ctx.save_for_backward(out if ctx.invertible else y, d, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (kept, d, bias) = grads, ctx.saved_tensors
        grad_y = torch.addcmul(g, g, d.to(g.dtype)) if ctx.needs_input_grad[0] else None
        grad_d = None
        if ctx.needs_input_grad[1]:
            z = kept if bias is None else kept - bias.to(kept.dtype)
            grad_d = _sum_to(g * z, d)
            if ctx.invertible:
                grad_d = grad_d / (
                    1 + d.to(kept.dtype).to(d.dtype)
                )  # the scale that was applied, rounding included
        grad_bias = None
        if ctx.needs_input_grad[2]:  # a method inside trains it
            grad_bias = -d.to(bias.dtype) * _sum_to(g, bias)
        return grad_y, grad_d, grad_bias


def _sum_to(values: Tensor, like: Tensor) -> Tensor:
    """Sum over all leading dimensions in the adapter's dtype.

    PyTorch accumulates a half-precision sum in float32 and rounds its result; a float32 result was measured to take 5 times as long. Here
    the sums of `_GROUPS` groups are rounded, and added in float32: no slower, and where values agree in sign a third of the error.
    """
    rows = values.reshape(-1, values.shape[-1])
    if rows.dtype == like.dtype:
        return rows.sum(0)
    even = len(rows) - len(rows) % _GROUPS
    total = rows[:even].view(_GROUPS, -1, rows.shape[1]).sum(1).sum(0, dtype=like.dtype)
    return total if even == len(rows) else total + rows[even:].sum(0, dtype=like.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in the memory of `total` unless a second derivative is wanted; `addmm_` is not counted by FlopCounterMode."""
    return torch.addmm(total, left, right, out=None if torch.is_grad_enabled() else total)


def _columns(U: Tensor, dtype: torch.dtype) -> Tensor:
    """U^T (k, m), contiguous: both products with it were measured to be faster so, up to three times in float32."""
    return U.T.to(dtype, memory_format=torch.contiguous_format)
