"""Pure: optimizer step -> is there an event, and how large a budget or a swap."""

import math
from dataclasses import dataclass

from adaptrank._errors import UserError


@dataclass(frozen=True)
class Phases:
    """The three phases of a run, in optimizer steps: scores warm up, ranks move, the last-born units settle.

    Events fall on steps t with warmup < t <= end and (t - warmup) divisible by `every`, and on `end` itself, where
    end = total - final.
    """

    total: int
    warmup: int
    final: int
    every: int

    @property
    def end(self) -> int:
        """The last step on which ranks move."""
        return self.total - self.final

    def is_event(self, step: int) -> bool:
        """Whether ranks may move after optimizer step `step` (1-based)."""
        return self.warmup < step <= self.end and (
            (step - self.warmup) % self.every == 0 or step == self.end
        )

    def events(self) -> list[int]:
        """The steps of all events of the run."""
        return [step for step in range(self.warmup + 1, self.end + 1) if self.is_event(step)]

    def progress(self, step: int) -> float:
        """0 until the warm-up ends, 1 from `end` on."""
        span = self.end - self.warmup
        return 1.0 if span <= 0 else min(1.0, max(0.0, (step - self.warmup) / span))


def steps(amount: int | float, total: int) -> int:
    """Steps of a phase: an integer is steps, a float in [0, 1] is a fraction of all.

    Raises:
        ValueError: for a negative amount or a fraction above 1.
    """
    if amount < 0 or (isinstance(amount, float) and amount > 1):
        raise UserError(
            f"{amount} is no length of a phase; give whole steps, or a fraction from 0.0 to 1.0."
        )
    return round(amount * total) if isinstance(amount, float) else amount


def cubic(start: int, target: int, progress: float) -> int:
    """AdaLoRA's budget (arXiv:2303.10512): floor(target + (start - target) (1 - progress)^3)."""
    return math.floor(target + (start - target) * (1 - progress) ** 3 + 1e-9)


def late_drop(swaps: int, progress: float) -> int:
    """ElaLoRA's number of swaps (arXiv:2504.00254): swaps (1 - progress^3), halves rounded up.

    Flat first, fast drop last: for 4 it is 4, 4, 4, 3, 3, 2, 1, 1, 0 at 0, .25, .5, .6, .7, .8, .9, .95, 1.
    """
    return math.floor(swaps * (1 - progress**3) + 0.5 + 1e-9)
