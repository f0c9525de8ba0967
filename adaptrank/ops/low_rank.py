"""Add a low-rank product to a linear layer, W x + bias + U V x, in one autograd step.

Written with autograd's operations, a thin product costs more in the operations around it than in
itself: a copy of the input in the adapter's dtype, a scaled copy of the change, its addition, and
the same again for the gradient. Here the product accumulates the change into the output, and the
gradient of the input into that of the frozen product.

Over a bf16 layer the products are taken in bf16, like the layer's own. The input is bf16 already,
and the sum is rounded to bf16 in any case. Outside of the products, U, V and their gradients are
float32. A change below 2^-8 of the layer's output is partly lost in that rounding, as it is
wherever the output of an adapter is added to that of a bf16 layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptrank import layers
from adaptrank.ops.products import (
    contiguous,
    fresh_view,
    scaled_product,
    traceable_scale,
    transposed,
)

# float16 would overflow in a gradient that is summed over tokens.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def fits(x: Tensor) -> bool:
    """Return whether products with this input are taken here.

    The input must have a dtype that is safe to sum in, and autocast must be off.
    """
    if x.dtype not in _DTYPES:
        return False
    device = x.device.type
    # The meta device has no autocast.
    return not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))


def plain(
    layer: nn.Module, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """Return (W (m, n), bias) if the forward of a linear layer can be bypassed, else None.

    It can be if the layer has no hook and no forward of its own, trains nothing, and is neither
    quantized nor sharded.

    Args:
        layer: the layer that a wrapper would call.
        dtype: dtype that W must have, that of the input. None accepts any.
    """
    if type(layer) not in layers.LINEAR or "forward" in vars(layer) or _has_hooks(layer):
        return None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.requires_grad:
        return None
    if bias is not None and bias.requires_grad:
        return None
    if dtype is not None and weight.dtype != dtype:
        return None
    return (weight.T if type(layer) is Conv1D else weight), bias


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def linear(
    x: Tensor, W: Tensor, bias: Tensor | None, U: Tensor, V: Tensor, scale: float = 1.0
) -> Tensor:
    """Return W x + bias + s U V x.

    Args:
        x: (..., n), in the dtype of W.
        W: (m, n), frozen.
        bias: (m,), frozen, or None.
        U: (m, k), in the adapter's dtype.
        V: (k, n), in the adapter's dtype.
        scale: s. It costs no operation of its own.
    """
    U, scale = traceable_scale(U, scale)
    return _Linear.apply(x, W, bias, U, V, scale)[0]  # type: ignore[no-any-return, no-untyped-call]


def accumulate(y: Tensor, z: Tensor, U: Tensor, fresh: bool = False, scale: float = 1.0) -> Tensor:
    """Return y + s U z, block by block of y if z has blocks.

    Args:
        y: (..., m).
        z: (..., k), or (..., b, k) if y consists of b blocks, in the dtype of y.
        U: (m, k), or (m / b, k), in the adapter's dtype.
        fresh: whether y may be written to, because nobody else holds it and autograd has not saved
            it.
        scale: s. It costs no operation of its own.
    """
    U, scale = traceable_scale(U, scale)
    return _Accumulate.apply(y, z, U, fresh, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    """(x, W, bias, U, V, s) -> (W x + bias + s U z, z = V x).

    z is an output only to give it a second derivative. No caller reads it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        U: Tensor,
        V: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        V_rounded, Ut_rounded = V.to(x.dtype), transposed(U, x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        z = F.linear(rows, V_rounded)
        out = _add_product(F.linear(rows, W, bias), z, Ut_rounded, scale)
        ctx.set_materialize_grads(False)
        _, _, _, needs_U, needs_V, _ = ctx.needs_input_grad
        kept_for_U = (U, z) if needs_U else (None, None)
        kept_for_V = (V, x) if needs_V else (None, None)
        ctx.save_for_backward(W, *kept_for_U, *kept_for_V)
        ctx.shape, ctx.rounded, ctx.scale = x.shape, (Ut_rounded, V_rounded), scale
        return fresh_view(out, (*x.shape[:-1], out.shape[-1])), z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, grad_z = grads
        W, U, z, V, x = ctx.saved_tensors
        needs_x, _, _, needs_U, needs_V, _ = ctx.needs_input_grad
        Ut, Vr = ctx.rounded
        # For a second derivative the factors are variables.
        if torch.is_grad_enabled():
            Ut = Ut if U is None else U.T.to(Ut.dtype)
            Vr = Vr if V is None else V.to(Vr.dtype)
        grad_x = grad_U = grad_V = None
        # The gradient of z is scale * grad_hidden.
        grad_hidden, scale = None, ctx.scale
        if g is not None:
            rows = g.reshape(-1, g.shape[-1])
            if needs_x or needs_V:
                grad_hidden = F.linear(rows, Ut)
            if needs_U:
                grad_U = _transposed_like(scaled_product(z.T, rows, scale, Ut), U)
        # z has a gradient of its own in a second derivative only.
        if grad_z is not None:
            grad_hidden = grad_z if grad_hidden is None else scale * grad_hidden + grad_z
            scale = 1.0
        if needs_V and grad_hidden is not None:
            inputs = x.reshape(-1, x.shape[-1])
            grad_V = scaled_product(grad_hidden.T, inputs, scale, Vr).to(V.dtype)
        if needs_x and grad_hidden is not None:
            if g is None:
                grad_x = grad_hidden @ Vr
            else:
                grad_x = _add_product(rows @ W, grad_hidden, Vr, scale)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_U, grad_V, None


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, U: Tensor, fresh: bool, scale: float) -> Tensor:
        Ut = transposed(U, y.dtype)
        total = y.reshape(-1, Ut.shape[1])
        rows = z.reshape(len(total), Ut.shape[0])
        ctx.save_for_backward(z, U)
        ctx.rounded, ctx.scale = Ut, scale
        if fresh:
            ctx.mark_dirty(y)
            _add_product(total, rows, Ut, scale)
            return y
        return fresh_view(torch.addmm(total, rows, Ut, alpha=scale), y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (z, U) = grads, ctx.saved_tensors
        needs_y, needs_z, needs_U, _, _ = ctx.needs_input_grad
        rows = g.reshape(-1, U.shape[0])
        hidden = z.reshape(len(rows), U.shape[1])
        Ut = U.T.to(g.dtype) if torch.is_grad_enabled() else ctx.rounded
        grad_z = grad_U = None
        if needs_z:
            grad_z = scaled_product(rows, Ut.T, ctx.scale, hidden).view(z.shape)
        if needs_U:
            grad_U = _transposed_like(scaled_product(hidden.T, rows, ctx.scale, Ut), U)
        return g if needs_y else None, grad_z, grad_U, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return total + scale left @ right, written into `total` unless a derivative is wanted.

    `addmm` with `out` is used because FlopCounterMode does not count `addmm_`.
    """
    out = None if torch.is_grad_enabled() else total
    return torch.addmm(total, left, right, alpha=scale, out=out)


def _transposed_like(values: Tensor, U: Tensor) -> Tensor:
    """Return the transpose of `values` (k, m) in the dtype and the layout of U (m, k).

    A gradient of another layout than its parameter would be copied once more.
    """
    return contiguous(values.T, U.dtype) if U.is_contiguous() else values.to(U.dtype).T
