"""Train a whole module in float32 inside a half-precision model."""

from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of a module's first parameter, or None if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), None)


def train_in_float32(module: nn.Module, dtype: torch.dtype | None, cast_back: bool) -> None:
    """Hold a half-precision module in float32, where small steps do not vanish.

    Its inputs are cast to float32 by a forward pre-hook, those by keyword and those inside of
    tuples, lists and mappings as well. A module in another dtype is left alone.

    Args:
        module: the module, which trains whole.
        dtype: its dtype before.
        cast_back: also cast the output back to the dtype of before, for the layers that follow.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return
    module.to(torch.float32)
    module.register_forward_pre_hook(_cast_inputs_to_float32, with_kwargs=True)
    if cast_back:
        module.register_forward_hook(partial(_cast_output, dtype))


def _cast_inputs_to_float32(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return cast_floats(args, torch.float32), cast_floats(kwargs, torch.float32)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return cast_floats(output, dtype)


def cast_floats(values: Any, dtype: torch.dtype) -> Any:
    """Return a tensor, or a collection of tensors, with all floating point tensors in a dtype.

    Masks, indices and objects such as caches stay as they are.
    """
    return apply_to_collection(
        values,
        Tensor,
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor,
    )
