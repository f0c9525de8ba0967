"""Split a fused linear layer (query, key and value in one) into a layer for each of its parts."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptrank._errors import UserTypeError
from adaptrank.layers.matrix import shape
from adaptrank.layers.quantized import quantized


class Parts(nn.Module):
    """A fused linear layer as a layer for each of its equal parts: y = [y_1, ..., y_k].

    The parts are layers of the same kind. They share memory with the fused layer until their
    tensors are replaced.

    Args:
        layer: an nn.Linear or a Conv1D that is not quantized.
        names: names of the parts, in the order of the outputs.

    Raises:
        UserTypeError: for a quantized layer.
    """

    def __init__(self, layer: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        if quantized(layer):
            raise UserTypeError(
                "a quantized layer cannot be split into its parts; say split_fused=False."
            )
        self.names = tuple(names)
        weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
        weights = weight.detach().chunk(len(names), _output_dim(layer))
        biases = [None] * len(names) if bias is None else bias.detach().chunk(len(names))
        for name, part_weight, part_bias in zip(names, weights, biases, strict=True):
            part = _linear_like(layer, part_weight, part_bias, weight.requires_grad)
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the outputs of the parts: (..., n) -> (..., m)."""
        return torch.cat([getattr(self, name)(x) for name in self.names], -1)

    @property
    def plain(self) -> list[nn.Module]:
        """The parts without their wrappers."""
        parts = [getattr(self, name) for name in self.names]
        return [getattr(part, "innermost", part) for part in parts]

    def fused(self, name: str) -> Tensor:
        """Return the weight or the bias of the fused layer, from the tensors of the plain parts.

        A missing bias counts as zero.
        """
        slices = []
        for part in self.plain:
            tensor = cast(Tensor | None, getattr(part, name))
            if tensor is None:
                tensor = cast(Tensor, part.weight).new_zeros(shape(part)[0])
            slices.append(tensor.detach())
        return torch.cat(slices, _output_dim(self.plain[0]) if name == "weight" else 0)

    def join(self) -> nn.Module:
        """Return the fused layer again, with the parameters that the plain parts have now."""
        first = self.plain[0]
        has_bias = any(part.bias is not None for part in self.plain)
        bias = self.fused("bias") if has_bias else None
        trains = cast(Tensor, first.weight).requires_grad
        return _linear_like(first, self.fused("weight"), bias, trains)


def _output_dim(layer: nn.Module) -> int:
    """Return the dimension of the stored weight that counts outputs."""
    return 1 if isinstance(layer, Conv1D) else 0


def _linear_like(like: nn.Module, weight: Tensor, bias: Tensor | None, trains: bool) -> nn.Module:
    """Build a layer of the kind of `like` around these tensors."""
    if isinstance(like, Conv1D):
        with torch.device("meta"):
            layer: nn.Module = Conv1D(weight.shape[1], weight.shape[0])  # type: ignore[no-untyped-call]
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=trains)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=trains)  # type: ignore[assignment]
    return layer.train(like.training)
