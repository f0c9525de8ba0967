"""Checks of what a training run is configured with, before the backbone is loaded."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from adaptrank._errors import UserError
from adaptrank._options import ANY, NOT_NEGATIVE, POSITIVE, check_number
from adaptrank.allocation.schedules import check_length

SCHEDULES = ("linear", "cosine", "constant")


def check_options(schedule: str, warmup: float, lora_plus_ratio: float, seed: int) -> None:
    """Check the options of `AdaptedModule` that do not need the model.

    Raises:
        UserError: naming the option, its value and what fits.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"schedule={schedule!r} is unknown. Use one of {', '.join(SCHEDULES)}.")
    check_number("warmup", warmup)
    check_length("warmup", warmup)
    check_number("lora_plus_ratio", lora_plus_ratio, POSITIVE)
    check_number("seed", seed, whole=True)


NEVER_NEGATIVE = ("lr", "weight_decay", "momentum")
"""Options of optimizers that are no exponent and no coefficient of a polynomial."""


def check_optimizer_options(make: Callable[[Iterable[Any]], torch.optim.Optimizer]) -> None:
    """Check the numbers of an optimizer on a parameter that nobody trains.

    All numbers must be finite. A learning rate, a weight decay and a momentum must not be negative.
    An optimizer that cannot be built on such a parameter is left to the run.

    Raises:
        UserError: naming the optimizer, the option and its value.
    """
    try:
        optimizer = make([nn.Parameter(torch.zeros(2, 2))])
    except UserError:
        raise
    except ValueError as error:
        # Optimizers call a wrong number invalid. Another error may be about the parameter.
        if "invalid" not in str(error).lower():
            return
        raise UserError(f"The optimizer cannot be made with these options: {error}.") from None
    except Exception:
        return
    name = type(optimizer).__name__
    for option, value in _numbers(getattr(optimizer, "defaults", {})):
        allowed = NOT_NEGATIVE if option in NEVER_NEGATIVE else ANY
        check_number(f"{name}: {option}", value, allowed)


def _numbers(defaults: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the numbers among the defaults of an optimizer, members of tuples one by one."""
    for option, value in defaults.items():
        for member in value if isinstance(value, tuple | list) else [value]:
            if not isinstance(member, bool) and isinstance(member, Real):
                yield option, member


def check_clipping(trainer: Trainer) -> None:
    """Check the clip value of a trainer. Lightning would not clip at all under a negative value.

    Raises:
        UserError: if it is negative or not finite.
    """
    value = trainer.gradient_clip_val
    if value is not None:
        check_number("gradient_clip_val", value, NOT_NEGATIVE)
