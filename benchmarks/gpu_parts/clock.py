"""The time that a benchmark may take, and the share of it that one part may take."""

import time
from collections.abc import Callable


class Deadline:
    """A point in time after which nothing new is begun.

    Args:
        seconds: seconds from now.
        now: a clock in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.begin = now()
        self.seconds = max(seconds, 0.0)

    def used(self) -> float:
        """Return the seconds since the beginning."""
        return self.now() - self.begin

    def left(self) -> float:
        """Return the seconds to the end, negative after it."""
        return self.seconds - self.used()

    def allows(self, seconds: float) -> bool:
        """Return whether something that takes these seconds ends in time."""
        return seconds <= self.left()

    def part(self, share: float) -> "Deadline":
        """Return a deadline at a share of the whole time from now, and not after this one."""
        return Deadline(min(self.left(), share * self.seconds), self.now)
