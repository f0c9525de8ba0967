"""HyperAdapt: a trained scale for every row and every column of a frozen weight."""

from typing import Any

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank.parameterizations.base import Cost, Parameterization


class HyperAdapt(Parameterization):
    """W' = diag(1 + da) W diag(1 + dc): one scale a row, one a column, m + n parameters.

    The change W' - W can have any rank up to min(2 rank(W), m, n). It starts at W exactly (that the paper starts at ones
    too is recalled, not verified). The parameters are the deviations from 1, so that neither half-precision activations nor
    weight decay distort them. There is no rank axis: the cost is fixed.

    Source: arXiv:2509.18629 (formula, parameter count and rank bound from the abstract).
    Shapes: W (m, n), da (m,), dc (n,). Extra cost: N (m + n) multiplications for N tokens, and no second product.
    Training keeps x and y only, no scaled copies. Of an embedding a column is a token; of a convolution it is an input channel:
    its dc has one entry a channel, not one a tap.
    Args:
        rows: train the row scales da.
        cols: train the column scales dc.
    Raises:
        ValueError: if neither rows nor columns are trained.
    """

    source = "arXiv:2509.18629"
    accepts = layers.MATRICES
    reads_weight = True
    no_decay = ("da", "dc")

    def __init__(self, base: nn.Module, *, rows: bool = True, cols: bool = True) -> None:
        super().__init__(base)
        if not (rows or cols):
            raise ValueError("HyperAdapt(rows=False, cols=False) trains nothing; leave one of them on.")
        m, n = self.shape
        plain = self.innermost
        self.taps = n // plain.in_channels if isinstance(plain, nn.Conv2d) else 1  # columns that share a scale
        self.da = self.zeros(m) if rows else None
        self.dc = self.zeros(n // self.taps) if cols else None

    @property
    def weight(self) -> Tensor:
        weight = self.base_weight
        if self.da is not None:
            weight = (1 + self.da)[:, None] * weight
        if self.dc is not None:
            weight = weight * (1 + self.dc).repeat_interleave(self.taps)
        return weight

    def adapted(self, x: Tensor) -> Tensor:
        plain = self.innermost
        if isinstance(plain, nn.Embedding):
            y: Tensor = self.base(x)
            if self.dc is not None:  # W (dc * onehot(x)) is the row of W, scaled by the token's own number
                y = y + y * self.dc[x][..., None].to(y.dtype)
        else:
            if self.dc is not None:
                x = layers.channels_first(plain, _ScaleInput.apply(layers.channels_last(plain, x), self.dc))  # type: ignore[no-untyped-call]
            y = self.base(x)
        # The bias is subtracted inside the deviation, so that da = 0 is the identity to the last bit.
        if self.da is not None:
            y = layers.channels_first(plain, _ScaleOutput.apply(layers.channels_last(plain, y), self.da, self.bias))  # type: ignore[no-untyped-call]
        return y

    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(kept=(n if self.dc is not None else 0) + (m if self.da is not None else 0))


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
        ctx.invertible = bias is None and ctx.needs_input_grad[1] and not bool(((1 + d).abs() < 0.1).any())
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
                grad_d = grad_d / (1 + d.to(kept.dtype).to(d.dtype))  # the scale that was applied, rounding included
        grad_bias = None
        if ctx.needs_input_grad[2]:  # a method inside trains it
            grad_bias = -d.to(bias.dtype) * _sum_to(g, bias)
        return grad_y, grad_d, grad_bias


def _sum_to(values: Tensor, like: Tensor) -> Tensor:
    """Sum over all leading dimensions, accumulated in the adapter's dtype."""
    return values.reshape(-1, values.shape[-1]).sum(0, dtype=like.dtype)
