"""The rounds of a run: which optimizer steps belong to which round. Pure."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from adaptrank._errors import UserError


@dataclass(frozen=True)
class Rounds:
    """Rounds of a run, counted from 0, and the borders between them.

    Args:
        borders: numbers of optimizer steps after which a round ends and the next one begins. The
            end of the run is no border.
        total: optimizer steps of the run.
    """

    borders: tuple[int, ...]
    total: int

    @classmethod
    def of_length(cls, length: int, total: int) -> "Rounds":
        """Return rounds of a fixed length. The last one may be shorter."""
        return cls(tuple(range(length, total, length)), total)

    @classmethod
    def of_count(cls, count: int, total: int) -> "Rounds":
        """Return a number of rounds whose lengths differ by one step at most.

        Raises:
            UserError: if there are more rounds than steps.
        """
        if count > total:
            raise UserError(
                f"{count} rounds do not fit into a run of {total} optimizer steps; ask for "
                f"{max(1, total)} or fewer, or train longer."
            )
        return cls(tuple(total * number // count for number in range(1, count)), total)

    @classmethod
    def at(cls, borders: Sequence[int], total: int) -> "Rounds":
        """Return rounds between given borders."""
        return cls(tuple(border for border in borders if border < total), total)

    def __len__(self) -> int:
        return len(self.borders) + 1

    def number(self, steps_done: int) -> int:
        """Return the round that the next step belongs to, after `steps_done` steps."""
        return bisect_right(self.borders, steps_done)

    def start(self, number: int) -> int:
        """Return the number of steps before the first step of a round."""
        return 0 if number == 0 else self.borders[number - 1]

    def end(self, number: int) -> int:
        """Return the number of steps at the end of a round."""
        return self.borders[number] if number < len(self.borders) else self.total

    def length(self, number: int) -> int:
        """Return the number of steps of a round."""
        return self.end(number) - self.start(number)
