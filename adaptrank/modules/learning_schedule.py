"""The learning rate over the steps of a run: a linear warm-up, and what follows it.

The formulas are those of `transformers.get_scheduler`. Its import takes seconds where PEFT or
bitsandbytes are installed, which it brings along.
"""

import math
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR


def learning_schedule(
    name: str, optimizer: torch.optim.Optimizer, warmup: int, total: int
) -> LambdaLR:
    """Return the schedule of an optimizer.

    Args:
        name: linear, cosine or constant.
        optimizer: its learning rates are multiplied by the factor of each step.
        warmup: steps in which the factor rises from 0 to 1.
        total: steps of the run, at whose end the factor is 0, unless it is constant.
    """
    return LambdaLR(optimizer, partial(factor_at, name=name, warmup=warmup, total=total))


def factor_at(step: int, *, name: str, warmup: int, total: int) -> float:
    """Return the factor of the learning rate at a step.

    With progress p from 0 to 1 after the warm-up it is 1 - p (linear), (1 + cos(pi p)) / 2 (cosine)
    or 1 (constant).
    """
    if step < warmup:
        return step / max(1, warmup)
    if name == "constant":
        return 1.0
    after = max(1, total - warmup)
    if name == "linear":
        return max(0.0, (total - step) / after)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / after))))
