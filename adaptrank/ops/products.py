"""Parts of the autograd functions that are written by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor


def scaled_product(left: Tensor, right: Tensor, s: float, like: Tensor) -> Tensor:
    """Return s (left @ right) in one operation.

    Args:
        left: (i, k).
        right: (k, j).
        s: the scale.
        like: a tensor of (i, j) or (1, 1), with the dtype and the device of the result. Its numbers
            are not read.
    """
    return torch.addmm(like, left, right, beta=0, alpha=s)


def fresh_view(result: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape a fresh result, without a view that autograd knows of.

    A model may change an output in place, and autograd refuses that for a view that was made inside
    of a function. `F.linear` returns such a view for an input of three dimensions.
    """
    viewed: Tensor = torch.ops.aten._unsafe_view.default(result, shape)
    return viewed


def traceable_scale(factor: Tensor, s: float | Tensor) -> tuple[Tensor, float]:
    """Return (s * factor, 1) in a compiled graph, or for a trained scale, else both as they are.

    A graph would hold a scale that multiplies no tensor as a constant, and layers whose scales
    differ would need a graph each.
    """
    if torch.compiler.is_compiling() or isinstance(s, Tensor):
        return s * factor, 1.0
    return factor, s


def contiguous(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor of a dtype, by one operation at most."""
    # `to` returns a transposed matrix as it is, if it has the dtype.
    if values.dtype == dtype:
        return values.contiguous()
    return values.to(dtype, memory_format=torch.contiguous_format)


def as_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient in the dtype of its parameter, and contiguous.

    Autograd would copy a gradient of another layout once more.
    """
    return contiguous(gradient, parameter.dtype)


def transposed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the transpose in a dtype, contiguous on a CPU.

    There a product of the backward pass takes half the time with it in float32, and a quarter in
    bf16. A GPU multiplies either layout, and then float32 needs no copy.
    """
    return contiguous(factor.T, dtype) if factor.device.type == "cpu" else factor.T.to(dtype)
