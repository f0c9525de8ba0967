"""Train a whole module in float32 inside a half-precision model."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of a module's first parameter, or None if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), None)


def train_in_float32(module: nn.Module, dtype: torch.dtype | None, cast_back: bool) -> None:
    """Hold a half-precision module in float32, where small steps do not vanish.

    Its inputs are cast to float32 by a forward pre-hook. A module in another dtype is left alone.

    Args:
        module: the module, which trains whole.
        dtype: its dtype before.
        cast_back: also cast the output back to the dtype of before, for the layers that follow.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return
    module.to(torch.float32)
    module.register_forward_pre_hook(_cast_inputs_to_float32)
    if cast_back:
        module.register_forward_hook(partial(_cast_output, dtype))


def _cast_inputs_to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args
    )


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output
