"""Optimizer state in tensors that hold quantized values: tensor subclasses, and float8.

torchao's optimizers keep moments in subclasses of Tensor with 8 bits, 4 bits or float8. They share
an interface, and no import of torchao is needed: `dequantize()` gives the values, `zeros(shape)`
makes an empty state, `copy_` quantizes into it, and `block_size` elements share a scale. A block
runs across units, so a state is decoded, changed and encoded again.
"""

from typing import Any, cast

from torch import Tensor, nn

LEAST_QUANTIZED = 4096
"""Size from which torchao quantizes a state (bitsandbytes likewise)."""


def is_quantized_tensor(value: Tensor) -> bool:
    """Return whether a tensor is of a subclass with the interface above."""
    kind = type(value)
    is_own = kind.dequantize is not Tensor.dequantize
    return is_own and hasattr(kind, "zeros") and hasattr(value, "block_size")


def dequantized(value: Tensor) -> Tensor:
    """Return the values of a quantized tensor in float32, and any other tensor as it is."""
    if is_quantized_tensor(value):
        plain: Tensor = value.dequantize()
        return plain
    return value.float() if _is_float8(value) else value


def requantized(values: Tensor, form: Tensor) -> Tensor:
    """Return values in the form of a state, whose shape they need not have.

    Args:
        values: plain values.
        form: the state from which they come.
    Returns:
        Values that are quantized as in `form`. They stay plain, in the dtype that `form` shows,
        where the optimizer itself would not quantize a tensor of their size.
    """
    if not is_quantized_tensor(form):
        return values.to(form.dtype) if _is_float8(form) else values
    block = int(cast(Any, form).block_size)
    if values.numel() < LEAST_QUANTIZED or values.numel() % block:
        return values.to(form.dtype).contiguous()
    arguments: dict[str, Any] = {"block_size": block, "device": form.device, "dtype": form.dtype}
    if hasattr(form, "signed"):
        arguments["signed"] = form.signed
    state: Tensor = cast(Any, type(form)).zeros(values.shape, **arguments)
    return state.copy_(values.contiguous())


def _is_float8(value: Tensor) -> bool:
    return value.dtype.is_floating_point and value.dtype.itemsize == 1


def misfit_of_kind(value: Tensor) -> str | None:
    """Describe a tensor whose elements cannot be moved one by one, or return None."""
    if getattr(value, "is_paged", False):
        return "is in paged memory"
    is_plain = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    if not is_plain and not is_quantized_tensor(value):
        return f"is a {type(value).__name__}, no plain tensor"
    if not value.is_floating_point() and not value.is_complex():
        return f"holds {str(value.dtype).removeprefix('torch.')} codes of unknown form"
    return None


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "to_local")
