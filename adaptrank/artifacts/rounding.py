"""The part that rounding takes from a change when merged weights are cast to the model's dtype."""

import logging
import math
from dataclasses import dataclass

from torch import Tensor

log = logging.getLogger("adaptrank")


@dataclass
class RoundingLoss:
    """Sums of squares of a change, and of the part of it that rounding took.

    Args:
        lost: sum of squares of the rounding errors.
        changed: sum of squares of the whole change.
    """

    lost: float = 0.0
    changed: float = 0.0

    def add(self, exact: Tensor, rounded: Tensor, original: Tensor) -> None:
        """Count one weight: its merged value, the same rounded, and its frozen value."""
        self.lost += float((rounded.to(exact.dtype) - exact).double().square().sum())
        self.changed += float((exact - original).double().square().sum())

    def share(self) -> float:
        """Return |rounded - exact| / |exact - original|, or 0 for no change."""
        return math.sqrt(self.lost / self.changed) if self.changed else 0.0

    def warn(self, sentence: str) -> None:
        """Log a sentence with the lost percentage if more than a fifth of the change is lost."""
        if self.lost > 0.04 * self.changed > 0:
            log.warning(sentence, 100 * (self.lost / self.changed) ** 0.5)
