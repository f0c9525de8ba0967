"""How a frozen layer looks as a matrix: W (m, n) = (out, in), whatever its kind and however its weight is stored.

A convolution is the matrix from patches to channels, n = in_channels * kh * kw; an embedding is the one from one-hot tokens to
vectors, n = num_embeddings. Everything a method computes is channels-last, (..., m); only a convolution stores it otherwise.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from adaptrank._errors import UserTypeError

LINEAR = (nn.Linear, Conv1D)
"""What "all-linear" means."""
MATRICES = (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)
"""Everything that has an (m, n) here."""


def shape(layer: nn.Module) -> tuple[int, int]:
    """(m, n) of a layer, without building anything.

    Raises:
        TypeError: if the layer is no matrix.
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


def unsupported(layer: nn.Module) -> str | None:
    """Why a layer of an accepted kind cannot be wrapped all the same, or None where it can."""
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"a convolution in {layer.groups} groups is no single matrix; leave it out"
    if isinstance(layer, nn.Conv2d) and type(layer).forward is not nn.Conv2d.forward:
        return f"{type(layer).__name__} changes what a convolution computes; leave it out"
    if isinstance(layer, nn.Embedding) and type(layer).forward is not nn.Embedding.forward:
        return f"{type(layer).__name__} changes what an embedding computes; leave it out"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "an embedding with max_norm rewrites its weight in the forward pass; leave it out"
    return None


def is_read(layer: nn.Module) -> bool:
    """Whether the module that holds the layer reads its weight and never calls it: the `out_proj` of nn.MultiheadAttention."""
    return isinstance(layer, NonDynamicallyQuantizableLinear)


def quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored in a quantized form (bitsandbytes, torchao)."""
    return _quantized(getattr(layer, "weight", None))


def _quantized(weight: object) -> bool:
    if not isinstance(weight, Tensor):
        return False
    # bitsandbytes' Params4bit and Int8Params hold ordinary numbers until they are moved to their device.
    packed = getattr(weight, "quant_state", None) is not None or (
        hasattr(weight, "SCB") and weight.dtype == torch.int8
    )
    return packed or _torchao(weight)


def _torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def dequantize(layer: nn.Module) -> Tensor:
    """The layer's weight as an ordinary floating-point tensor, in the layer's own layout."""
    weight = cast(Tensor, layer.weight)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        whole: Tensor = dequantize_4bit(weight.data, state)
        return whole
    if hasattr(weight, "SCB") and _quantized(weight):
        # The first forward of the layer moves its scales, one a row, from the weight to the layer.
        scale = cast(Tensor, weight.SCB if weight.SCB is not None else cast(Any, layer).state.SCB)
        return weight.data.float() * scale.float()[:, None] / 127
    return readable(weight)


def readable(weight: Tensor) -> Tensor:
    """A tensor whose elements can be read: torchao's dequantized, bitsandbytes' as the codes that it stores."""
    if hasattr(weight, "full_tensor"):  # of a sharded base; every process has to ask for it
        weight = weight.full_tensor()
    return cast(Tensor, cast(Any, weight).dequantize()) if _torchao(weight) else weight


def dtype(layer: nn.Module) -> torch.dtype:
    """The floating-point type of a layer's weight; of a quantized one, what it computes in."""
    weight = (
        layer.weight
        if isinstance(getattr(layer, "weight", None), Tensor)
        else next(layer.parameters())
    )
    if not isinstance(weight, Tensor):
        raise UserTypeError(f"{type(layer).__name__} has no weight.")
    if weight.is_floating_point():
        return weight.dtype
    return cast(torch.dtype, getattr(getattr(weight, "quant_state", None), "dtype", torch.float32))


def device(layer: nn.Module) -> torch.device:
    """Where a layer's tensors are."""
    return next(layer.parameters()).device


def dense(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight as a matrix (m, n); a norm's gain as it is, (d,)."""
    weight = dequantize(layer).to(dtype)
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return weight.T
    return weight.flatten(1) if isinstance(layer, nn.Conv2d) else weight


def stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """A matrix (m, n) in the layout that the layer stores its weight in: the inverse of `dense`."""
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return weight.T
    if isinstance(layer, nn.Conv2d):
        return weight.reshape(-1, layer.in_channels, *layer.kernel_size)
    return weight


def project(layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
    """What the layer would compute from x with A (k, n) for its weight and no bias: (..., k), channels last."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, A.T)
    if isinstance(layer, nn.Conv2d):
        y: Tensor = layer._conv_forward(x, stored(layer, A), None)
        return channels_last(layer, y)
    return F.linear(x, A)


def channels_last(layer: nn.Module, y: Tensor) -> Tensor:
    """An output of the layer as (..., m)."""
    return y.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else y


def channels_first(layer: nn.Module, y: Tensor) -> Tensor:
    """The inverse of `channels_last`: (..., m) as the layer would return it."""
    return y.movedim(-1, -3) if isinstance(layer, nn.Conv2d) else y


def example_input(layer: nn.Module, leading: tuple[int, ...], random: torch.Generator) -> Tensor:
    """An input of the layer with these leading dimensions, drawn on the CPU; a convolution's are flattened to one."""
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, leading, generator=random)
    if isinstance(layer, nn.Conv2d):
        batch = torch.Size(leading).numel()
        size = (batch, layer.in_channels, *(side + 2 for side in layer.kernel_size))
    else:
        width = (
            shape(layer)[1] if isinstance(layer, MATRICES) else cast(Tensor, layer.weight).shape[-1]
        )
        size = (*leading, width)
    return torch.randn(size, generator=random, dtype=torch.float64).to(dtype(layer))


def write(layer: nn.Module, values: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Set parameters of a layer to new values in their own dtype, and return what was there.

    Args:
        layer: whose parameters; one that it lacks (a bias) is made.
        values: dotted name -> value in the layer's own layout. None takes the parameter away again.
    """
    before: dict[str, Tensor | None] = {}
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        owner = layer.get_submodule(path)
        have = owner._parameters.get(last)
        before[name] = None if have is None else have.data
        if have is not None and value is not None:
            have.data = value.to(have.dtype).contiguous()
        elif value is not None:
            like = dtype(owner)
            owner.register_parameter(
                last, nn.Parameter(value.to(like).contiguous(), requires_grad=False)
            )
        else:
            owner.register_parameter(last, None)
    return before


class Parts(nn.Module):
    """A fused linear layer as a layer for each of its equal parts, of the same kind: y = [y_1, ..., y_k].

    Args:
        layer: nn.Linear or Conv1D, not quantized; its tensors are shared until someone writes to them.
        names: of the parts, in the order of the outputs.
    Raises:
        TypeError: for a quantized layer.
    """

    def __init__(self, layer: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        if quantized(layer):
            raise UserTypeError(
                "a quantized layer cannot be split into its parts; say split_fused=False."
            )
        self.names = tuple(names)
        weights = (
            cast(Tensor, layer.weight)
            .detach()
            .chunk(len(names), 1 if isinstance(layer, Conv1D) else 0)
        )
        bias = cast(Tensor | None, layer.bias)
        biases = [None] * len(names) if bias is None else bias.detach().chunk(len(names))
        trains = cast(Tensor, layer.weight).requires_grad
        for name, weight, part in zip(names, weights, biases, strict=True):
            self.add_module(name, _linear(layer, weight, part, trains))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return torch.cat([getattr(self, name)(x) for name in self.names], -1)

    @property
    def plain(self) -> list[nn.Module]:
        """The parts without their wrappers."""
        parts = [getattr(self, name) for name in self.names]
        return [getattr(part, "innermost", part) for part in parts]

    def fused(self, name: str) -> Tensor:
        """The weight or the bias of the fused layer, from what the plain parts hold; a missing bias counts as zero."""
        parts = self.plain
        tensors = [cast(Tensor | None, getattr(part, name)) for part in parts]
        weights = [cast(Tensor, part.weight) for part in parts]
        whole = [
            w.new_zeros(shape(part)[0]) if t is None else t.detach()
            for t, w, part in zip(tensors, weights, parts, strict=True)
        ]
        return torch.cat(whole, 1 if name == "weight" and isinstance(parts[0], Conv1D) else 0)

    def join(self) -> nn.Module:
        """The fused layer again, with the parameters that the plain parts have now."""
        like = self.plain[0]
        bias = self.fused("bias") if any(part.bias is not None for part in self.plain) else None
        return _linear(like, self.fused("weight"), bias, cast(Tensor, like.weight).requires_grad)


def _linear(like: nn.Module, weight: Tensor, bias: Tensor | None, trains: bool) -> nn.Module:
    """A layer of the kind of `like` around these tensors."""
    if isinstance(like, Conv1D):
        with torch.device("meta"):
            layer: nn.Module = Conv1D(weight.shape[1], weight.shape[0])  # type: ignore[no-untyped-call]
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=trains)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=trains)  # type: ignore[assignment]
    return layer.train(like.training)


# ---- attention modules of transformers


Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query, key, value, mask, **more) -> (output (batch, queries, heads, width), weights or None), as in transformers."""

_ROUTE = "adaptrank"


def attends(layer: nn.Module) -> bool:
    """Whether the module is an attention of transformers whose inner function can be replaced: it looks it up in a table."""
    return (
        "Attention" in type(layer).__name__
        and hasattr(getattr(layer, "config", None), "num_attention_heads")
        and hasattr(sys.modules[type(layer).__module__], "ALL_ATTENTION_FUNCTIONS")
        and any(name in layer._modules for name in (*QUERIES, *FUSED_QUERIES))
    )


QUERIES = ("q_proj", "query", "q_lin", "q", "q_attn")
"""How attention modules call a query projection of its own."""
FUSED_QUERIES = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv")
"""And one that holds keys and values too."""


@contextmanager
def attending(
    layer: nn.Module, function: Callable[..., tuple[Tensor, Tensor | None]]
) -> Iterator[None]:
    """Within, the attention module computes `function(original, module, query, key, value, mask, **more)`.

    `original` is what it would have computed, sdpa or flash or eager. Masks are made by the model, which sees no difference.
    """
    from transformers.modeling_utils import (
        ALL_ATTENTION_FUNCTIONS,  # slow to import, and few methods need it
    )

    config: Any = layer.config
    eager: Any = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)
    original = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    ALL_ATTENTION_FUNCTIONS[_ROUTE] = _routed
    routed = copy.copy(config)
    routed._attn_implementation_internal = (
        _ROUTE  # the property would write into nested configs, which are shared
    )
    routed._adaptrank_attention = functools.partial(function, original)
    layer.config = routed
    try:
        yield
    finally:
        layer.config = config


def routed(layer: nn.Module) -> bool:
    """Whether the module is within an `attending` already."""
    return bool(cast(Any, layer).config._attn_implementation == _ROUTE)


def _routed(module: nn.Module, *args: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
    function: Attention = cast(Any, module).config._adaptrank_attention
    return function(module, *args, **more)
