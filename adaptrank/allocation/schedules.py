"""Schedules: from an optimizer step to events, budgets and numbers of swaps. Pure."""

import math
from dataclasses import dataclass

from adaptrank._errors import UserError


@dataclass(frozen=True)
class Phases:
    """Three phases of a run: scores warm up, ranks move, and the newest units settle.

    Events fall on steps t with warmup < t <= end and (t - warmup) divisible by `every`, and on
    `end` itself, where end = total - final.

    Args:
        total: optimizer steps of the run.
        warmup: steps before ranks may move.
        final: steps at the end in which no rank moves.
        every: steps from one event to the next.
    """

    total: int
    warmup: int
    final: int
    every: int

    @property
    def end(self) -> int:
        """Last step on which ranks move."""
        return self.total - self.final

    def is_event(self, step: int) -> bool:
        """Return whether ranks may move after optimizer step `step`, counted from 1."""
        if not self.warmup < step <= self.end:
            return False
        return (step - self.warmup) % self.every == 0 or step == self.end

    def events(self) -> list[int]:
        """Return the steps of all events of the run."""
        return [step for step in range(self.warmup + 1, self.end + 1) if self.is_event(step)]

    def events_between(self, before: int, step: int) -> list[int]:
        """Return the steps of the events after step `before` and up to `step`."""
        return [due for due in range(before + 1, step + 1) if self.is_event(due)]

    def progress(self, step: int) -> float:
        """Return 0 until the warm-up ends, 1 from `end` on, and a linear value between."""
        span = self.end - self.warmup
        if span <= 0:
            return 1.0
        return min(1.0, max(0.0, (step - self.warmup) / span))


def steps(amount: int | float, total: int) -> int:
    """Return the steps of a phase.

    Args:
        amount: number of steps as an integer, or a fraction of all steps as a float in [0, 1].
        total: optimizer steps of the run.
    Raises:
        UserError: for a negative amount or a fraction above 1.
    """
    check_length("", amount)
    if isinstance(amount, float):
        return round(amount * total)
    return amount


def check_length(name: str, amount: int | float) -> None:
    """Check the length of a phase, before the number of all steps is known.

    Args:
        name: option that it comes from, for the error.
        amount: as in `steps`.

    Raises:
        UserError: for a negative amount or a fraction above 1.
    """
    if amount < 0 or (isinstance(amount, float) and amount > 1):
        option = f"{name}=" if name else ""
        raise UserError(
            f"{option}{amount} is no length of a phase. Give whole steps, or a fraction from 0.0 "
            "to 1.0."
        )


def cubic(start: int, target: int, progress: float) -> int:
    """Return AdaLoRA's budget, floor(target + (start - target) (1 - progress)^3).

    Source: arXiv:2303.10512.
    """
    # The small term keeps rounding errors from losing a unit.
    return math.floor(target + (start - target) * (1 - progress) ** 3 + 1e-9)


def late_cubic(start: int, target: int, progress: float) -> int:
    """Return the budget of dynamic rank distribution, start - floor((start - target) progress^3).

    At least one unit of the budget is gone from the first event on. The curve falls late: half of
    the way has an eighth of the fall, where AdaLoRA's curve has seven eighths.

    Source: arXiv:2405.17357, the authors' code.
    """
    lost = math.floor((start - target) * progress**3 + 1e-9)
    return start - max(lost, 1)


def late_drop(swaps: int, progress: float) -> int:
    """Return ElaLoRA's number of swaps, swaps (1 - progress^3), halves rounded up.

    The number is flat first and drops fast at the end. For 4 swaps it is 4, 4, 4, 3, 3, 2, 1, 1, 0
    at a progress of 0, .25, .5, .6, .7, .8, .9, .95, 1.

    Source: arXiv:2504.00254.
    """
    return math.floor(swaps * (1 - progress**3) + 0.5 + 1e-9)
