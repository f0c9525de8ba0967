"""Optimizer state that follows a tensor when units are kept, added or closed."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from adaptrank._errors import UserTypeError

Optimizers = Iterable[torch.optim.Optimizer]

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
"""State keys of running means of the gradient. A new unit starts with zero."""

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})
"""State keys of squared gradients or their size. A new unit starts with the mean of the others."""

SUPPORTED = ("Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax")
"""PyTorch's optimizers whose state has one value for each element of the parameter."""

UNSUPPORTED = ("Rprop", "ASGD", "LBFGS", "Adafactor", "SparseAdam", "Muon")
"""Optimizers that keep state of another form, or scale their steps by it."""


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state cannot follow a resize.

    PyTorch's optimizers are known by name. All others are judged by their state: each tensor in it
    must be a single number or have the parameter's shape. Such an optimizer has to be checked again
    once it has made a step.

    Raises:
        TypeError: names the optimizers that work.
    """
    classes = type(optimizer).__mro__
    refused = any(cls.__name__ in UNSUPPORTED for cls in classes)
    # The name alone is not enough: other packages have an AdamW whose state is quantized.
    supported = any(
        cls.__name__ in SUPPORTED and cls.__module__.startswith("torch.optim") for cls in classes
    )
    misfit = None if refused or supported else _misfit(optimizer)
    if refused or misfit:
        raise UserTypeError(
            f"{type(optimizer).__name__} keeps state that cannot follow a rank{misfit or ''}; "
            f"use {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]} where ranks move."
        )


def _misfit(optimizer: torch.optim.Optimizer) -> str | None:
    """Describe a state tensor that is neither one number nor shaped like its parameter."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.numel() <= 1:
                continue
            if value.shape != parameter.shape:
                return (
                    f" (its {key!r} has shape {tuple(value.shape)} "
                    f"for a parameter {tuple(parameter.shape)})"
                )
    return None


def replace_units(
    tensor: Tensor, dim: int, keep: Sequence[int], fresh: Tensor | None, optimizers: Optimizers
) -> None:
    """Set a tensor to its kept slices followed by the fresh ones. Optimizer state follows.

    The tensor stays the same object, because optimizers hold it and tied layers may share it. The
    gradient of a parameter is dropped.

    Args:
        tensor: parameter or buffer.
        dim: dimension that counts units.
        keep: indices of the kept slices, in their new order.
        fresh: new slices, or None.
        optimizers: optimizers that may hold state of the tensor.
    """
    index = torch.tensor(list(keep), dtype=torch.long, device=tensor.device)
    kept = tensor.detach().index_select(dim, index)
    resized = kept if fresh is None else torch.cat([kept, fresh], dim)
    if not isinstance(tensor, nn.Parameter):
        tensor.data = resized
        return

    added = 0 if fresh is None else fresh.shape[dim]
    for optimizer in optimizers:
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                state[key] = _resized_state(key, value, dim, index, added)

    tensor.grad = None
    # Swap the data in two steps, through another dtype. This makes autograd forget the gradient
    # accumulator, which still expects the old shape.
    other_dtype = torch.float16 if tensor.dtype != torch.float16 else torch.float32
    tensor.data = torch.empty(0, dtype=other_dtype, device=tensor.device)
    tensor.data = resized.contiguous()


def _resized_state(key: str, value: Tensor, dim: int, index: Tensor, added: int) -> Tensor:
    """Select the kept slices of a state tensor, and append neutral ones."""
    kept = value.index_select(dim, index)
    if not added:
        return kept
    if key in SECOND_MOMENTS and kept.shape[dim] > 0:
        # Adam has one step counter for the whole tensor, so its bias correction is over for a fresh
        # unit as well. With a zero second moment such a unit would jump.
        neutral = kept.mean(dim, keepdim=True)
    else:
        neutral = torch.zeros_like(value.narrow(dim, 0, 1))
    shape = list(kept.shape)
    shape[dim] = added
    return torch.cat([kept, neutral.expand(shape)], dim)


def zero_first_moments(tensor: Tensor, dim: int, index: Tensor, optimizers: Optimizers) -> None:
    """Set the first moments of some slices of a tensor to zero, in place."""
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            follows = isinstance(value, Tensor) and value.shape == tensor.shape
            if follows and key in FIRST_MOMENTS:
                value.index_fill_(dim, index, 0)
