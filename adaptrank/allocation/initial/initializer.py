"""The contract of a rank initializer: it chooses ranks before the first step."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

from adaptrank.allocation.context import Axes
from adaptrank.allocation.participant import Choice, Participant

__all__ = ["Choice", "RankInitializer"]


class RankInitializer(Participant, ABC, registered=False):
    """Chooses the ranks that a new run starts from, and may set the tensors of the units.

    A subclass writes `choose`, and `initialize` if the start of the tensors matters. `choose`
    returns the ranks together with the evidence that they rest on. The engine resizes the axes and
    hands the evidence to `initialize`. An allocator may move the ranks afterwards.

    The total of the ranks is what the allocator of the run starts with.

    Args:
        budget: total to share out, in `unit`; None leaves it to the method.
        unit: "ranks" counts units; "parameters" counts all trainable parameters of the adapters.
        floor: smallest number of units of an axis.
        cap: largest number of units of an axis; None is the ceiling of the method.
        seed: seed of the generator that initializes new units.
        every: optimizer steps between two actions during training, for a method that has some.
        final: steps at the end in which such a method does nothing.
    """

    moves = False

    def __init__(
        self,
        budget: int | None = None,
        unit: Literal["ranks", "parameters"] = "ranks",
        floor: int = 1,
        cap: int | None = None,
        seed: int = 0,
        every: int = 10,
        final: int | float = 0,
    ) -> None:
        super().__init__(budget, unit, every, 0, final, floor, cap, seed)

    @property
    def chooses_ranks(self) -> bool:
        """Whether it chooses the ranks that a run starts from."""
        return True

    @abstractmethod
    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice:
        """Return the ranks to start from, and the evidence that they rest on.

        Args:
            axes: rank axes of the model, with the sizes that it was built with.
            batches: training batches from the beginning, read lazily.
        """
