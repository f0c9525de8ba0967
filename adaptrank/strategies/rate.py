"""A factor of the learning rate, multiplied in for the length of an optimizer step."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

GroupFactor = Callable[[dict[str, Any]], float]
"""Parameter group -> factor of its learning rate in the coming step."""


def scale_rate(optimizer: torch.optim.Optimizer, factor: GroupFactor) -> list[RemovableHandle]:
    """Multiply the learning rate of every group by a factor during each step of an optimizer.

    Between steps the rates are those of the user's schedule, so that schedulers, checkpoints and
    their logs do not see the factor.

    Args:
        optimizer: the optimizer.
        factor: is asked before each step.
    Returns:
        Handles that remove the factor.
    """
    rates: list[Any] = []

    def multiply(stepped: torch.optim.Optimizer, *_: Any) -> None:
        rates[:] = [group["lr"] for group in stepped.param_groups]
        for group in stepped.param_groups:
            value = factor(group)
            if value != 1.0:
                group["lr"] = group["lr"] * value

    def put_back(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group, rate in zip(stepped.param_groups, rates, strict=False):
            group["lr"] = rate

    return [
        optimizer.register_step_pre_hook(multiply),
        optimizer.register_step_post_hook(put_back),
    ]
