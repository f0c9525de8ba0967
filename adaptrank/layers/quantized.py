"""Read weights that are stored in a quantized form: bitsandbytes and torchao."""

from typing import Any, cast

import torch
from torch import Tensor, nn


def quantized(layer: nn.Module) -> bool:
    """Return whether the layer's weight is stored in a quantized form (bitsandbytes, torchao)."""
    return _is_quantized(getattr(layer, "weight", None))


def quantization(layer: nn.Module) -> dict[str, Any] | None:
    """Return the kind of a layer's quantization, as the key `quantize` names it, or None.

    {"type": "nf4"}, with "double_quant" for 4 bits, {"type": "llm-int8"}, {"type": "int8"}, or the
    name of torchao's class for another quantization of that library.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not _is_quantized(weight):
        return None
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return {"type": str(state.quant_type), "double_quant": bool(state.nested)}
    if not _is_torchao(weight):
        return {"type": "llm-int8"}
    kind = type(weight).__name__
    return {"type": "int8" if kind == "Int8Tensor" else kind}


def dequantize(layer: nn.Module) -> Tensor:
    """Return the layer's weight as an ordinary floating-point tensor, in the layer's own layout."""
    weight = cast(Tensor, layer.weight)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        values: Tensor = dequantize_4bit(weight.data, state)
        return values
    if hasattr(weight, "SCB") and _is_quantized(weight):
        # The first forward pass moves the scales, one for each row, from the weight to the layer.
        scale = cast(Tensor, weight.SCB if weight.SCB is not None else cast(Any, layer).state.SCB)
        return weight.data.float() * scale.float()[:, None] / 127
    return readable(weight)


def count_numbers(weight: Tensor) -> int:
    """Return the number of weights in a tensor, of which 4-bit ones share a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(torch.Size(state.shape).numel())


def readable(weight: Tensor) -> Tensor:
    """Return a tensor whose elements can be read.

    A sharded tensor is gathered, so every process has to call this. A tensor of torchao is
    dequantized. A tensor of bitsandbytes keeps its stored codes.
    """
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    return cast(Tensor, cast(Any, weight).dequantize()) if _is_torchao(weight) else weight


def dtype(layer: nn.Module) -> torch.dtype:
    """Return the floating-point type of a layer's weight.

    For a quantized layer this is the type that it computes in.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        weight = next(layer.parameters())
    if weight.is_floating_point():
        return weight.dtype
    state = getattr(weight, "quant_state", None)
    return cast(torch.dtype, getattr(state, "dtype", torch.float32))


def _is_quantized(weight: object) -> bool:
    if not isinstance(weight, Tensor):
        return False
    # Params4bit and Int8Params of bitsandbytes hold ordinary numbers until they reach their device.
    is_4bit = getattr(weight, "quant_state", None) is not None
    is_8bit = hasattr(weight, "SCB") and weight.dtype == torch.int8
    return is_4bit or is_8bit or _is_torchao(weight)


def _is_torchao(weight: Tensor) -> bool:
    # The comparison of types comes first, because torch.compile cannot trace the name of a module.
    if type(weight) is nn.Parameter or type(weight) is Tensor:
        return False
    return type(weight).__module__.startswith("torchao.")
