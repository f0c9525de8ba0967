"""Optimizer state that is forgotten, in whole or in part, when tensors start anew."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from adaptrank.axes.state_roles import Optimizers, Role, states_of, with_inner

MOMENTS = (Role.FIRST_MOMENT, Role.SECOND_MOMENT)


def forget_state(tensors: Iterable[Tensor], optimizers: Optimizers) -> None:
    """Delete the optimizer state of tensors, step counters included, and their gradients.

    With moments of zero and a large step counter, the bias correction of Adam would be missing, and
    its first step would be up to (1 - beta1) / sqrt(1 - beta2) learning rates long.
    """
    for tensor in tensors:
        tensor.grad = None
        for optimizer in with_inner(optimizers):
            optimizer.state.pop(tensor, None)


@torch.no_grad()
def prune_moments(
    tensors: Iterable[Tensor],
    optimizers: Optimizers,
    share: float,
    by: Literal["magnitude", "random"],
    generator: torch.Generator,
) -> None:
    """Set a share of the entries of every moment to zero.

    A first moment without its second one is zero as well. Adam would divide it by epsilon, while
    the gradient is zero, as that of LoRA's A is behind a B of zero. Step counters stay. Gradients
    are dropped.

    Args:
        tensors: the tensors whose moments are pruned.
        optimizers: optimizers that hold them.
        share: share of entries to set to zero, from 0 to 1.
        by: "magnitude" sets the smallest entries of each moment to zero, "random" a random draw.
        generator: CPU generator of the draw.
    """
    for tensor in tensors:
        tensor.grad = None
        for optimizer in optimizers:
            moments = [
                (role, state)
                for _, role, state in states_of(tensor, [optimizer])
                if role in MOMENTS and state.numel()
            ]
            for _, state in moments:
                _prune(state, share, by, generator)
            first = [state for role, state in moments if role is Role.FIRST_MOMENT]
            second = [state for role, state in moments if role is Role.SECOND_MOMENT]
            for state in first if second else []:
                has_second = torch.stack([other != 0 for other in second]).any(0)
                state.masked_fill_(~has_second, 0)


def _prune(
    state: Tensor, share: float, by: Literal["magnitude", "random"], generator: torch.Generator
) -> None:
    """Set a share of the entries of a tensor to zero: the smallest ones, or a random draw."""
    count = int(share * state.numel())
    if by == "magnitude":
        order = state.abs().flatten().argsort(stable=True)
    else:
        order = torch.randperm(state.numel(), generator=generator).to(state.device)
    state.view(-1).index_fill_(0, order[:count], 0)
