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

    Step counters stay. Gradients are dropped.

    Args:
        tensors: the tensors whose moments are pruned.
        optimizers: optimizers that hold them.
        share: share of entries to set to zero, from 0 to 1.
        by: "magnitude" sets the smallest entries of each moment to zero, "random" a random draw.
        generator: CPU generator of the draw.
    """
    for tensor in tensors:
        tensor.grad = None
        for _, role, state in states_of(tensor, optimizers):
            if role in MOMENTS and state.numel():
                count = int(share * state.numel())
                order = (
                    state.abs().flatten().argsort(stable=True)
                    if by == "magnitude"
                    else torch.randperm(state.numel(), generator=generator).to(state.device)
                )
                state.view(-1).index_fill_(0, order[:count], 0)
