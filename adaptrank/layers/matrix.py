"""A layer seen as a matrix W (m, n) = (out, in), whatever its kind and its storage.

A convolution is the matrix from patches to channels, with n = in_channels * kh * kw. An embedding
is the matrix from one-hot tokens to vectors, with n = num_embeddings. All methods compute
channels-last, (..., m). Only a convolution stores its output in another layout.
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from adaptrank._errors import UserTypeError
from adaptrank.layers.quantized import dequantize, dtype

LINEAR = (nn.Linear, Conv1D)
"""Kinds of layers that "all-linear" means."""
MATRICES = (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)
"""Kinds of layers that are a matrix (m, n)."""


def shape(layer: nn.Module) -> tuple[int, int]:
    """Return (m, n) of a layer, without building a tensor.

    Raises:
        UserTypeError: if the layer is no matrix.
    """
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, nn.Conv2d):
        kh, kw = layer.kernel_size
        return layer.out_channels, layer.in_channels * kh * kw
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    raise UserTypeError(f"{type(layer).__name__} is no matrix.")


def is_read(layer: nn.Module) -> bool:
    """Return whether the module that holds the layer reads its weight and never calls it.

    This is the case of the `out_proj` of nn.MultiheadAttention.
    """
    return isinstance(layer, NonDynamicallyQuantizableLinear)


def device(layer: nn.Module) -> torch.device:
    """Return the device of a layer's tensors."""
    return next(layer.parameters()).device


def dense(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight as a matrix (m, n), or the gain of a norm as it is, (d,)."""
    weight = dequantize(layer).to(dtype)
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return weight.T
    return weight.flatten(1) if isinstance(layer, nn.Conv2d) else weight


def stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a matrix (m, n) in the layout of the layer's weight: the inverse of `dense`."""
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return weight.T
    if isinstance(layer, nn.Conv2d):
        return weight.reshape(-1, layer.in_channels, *layer.kernel_size)
    return weight


def project(layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
    """Return the layer's output for the weight A (k, n) and no bias: (..., k), channels last."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, A.T)
    if isinstance(layer, nn.Conv2d):
        # A convolution has at least one output.
        if not len(A):
            return project(layer, x, A.new_zeros(1, A.shape[1]))[..., :0]
        y: Tensor = layer._conv_forward(x, stored(layer, A), None)
        return channels_last(layer, y)
    return F.linear(x, A)


def channels_last(layer: nn.Module, y: Tensor) -> Tensor:
    """Return an output of the layer as (..., m)."""
    return y.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else y


def channels_first(layer: nn.Module, y: Tensor) -> Tensor:
    """Return an output (..., m) in the layer's own layout: the inverse of `channels_last`."""
    return y.movedim(-1, -3) if isinstance(layer, nn.Conv2d) else y


def example_input(layer: nn.Module, leading: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Draw an input of the layer on the CPU, with these leading dimensions.

    The leading dimensions of a convolution's input are flattened to one.
    """
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, leading, generator=random)
    size: tuple[int, ...]
    if isinstance(layer, nn.Conv2d):
        batch = torch.Size(leading).numel()
        size = (batch, layer.in_channels, *(side + 2 for side in layer.kernel_size))
    elif isinstance(layer, MATRICES):
        size = (*leading, shape(layer)[1])
    else:
        size = (*leading, cast(Tensor, layer.weight).shape[-1])
    return torch.randn(size, generator=random, dtype=torch.float64).to(dtype(layer))


def write(layer: nn.Module, values: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Set parameters of a layer to new values, and return the previous ones.

    Args:
        layer: the layer. A parameter that it lacks, such as a bias, is made.
        values: dotted name -> value in the layer's own layout, which is cast to the dtype of the
            parameter. None removes the parameter.
    """
    previous: dict[str, Tensor | None] = {}
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        owner = layer.get_submodule(path)
        parameter = owner._parameters.get(last)
        previous[name] = None if parameter is None else parameter.data
        if value is None:
            owner.register_parameter(last, None)
        elif parameter is not None:
            parameter.data = value.to(parameter.dtype).contiguous()
        else:
            created = nn.Parameter(value.to(dtype(owner)).contiguous(), requires_grad=False)
            owner.register_parameter(last, created)
    return previous
