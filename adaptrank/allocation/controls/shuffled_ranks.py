"""ShuffledRanks: the final ranks of a recorded run, given to other layers."""

from collections.abc import Iterable
from typing import Any

import torch

from adaptrank.allocation.context import Axes
from adaptrank.allocation.controls.recorded_run import check_axes, read_ranks
from adaptrank.allocation.initial.initializer import Choice, RankInitializer
from adaptrank.allocation.scores.importance import unit_cost
from adaptrank.axes import generator


class ShuffledRanks(RankInitializer, control=True):
    """Start with the final ranks of a recorded run, dealt at random to the axes.

    This is a control for a pattern that an allocator found: the same histogram of ranks, at other
    places. `rank_pattern` replays the pattern itself. Ranks change places only among axes whose
    units cost the same, so that the number of parameters is that of the pattern. For axes that
    multiply each other, such as the bonds of a tensor train, the costs are those at the start.

    Args:
        run: folder of the recorded run, such as runs/NAME/0. It has a `ranks.json`.
        seed: seed of the order, and of the generator that initializes new units.
    Raises:
        UserError: if the run is not there. At the start: if it had other axes.
    """

    requires = frozenset({"pattern"})

    def __init__(self, run: str, seed: int = 0) -> None:
        super().__init__(floor=0, seed=seed)
        self.folder = run
        self.ranks = read_ranks(run)

    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice:
        check_axes(self.label, self.folder, self.ranks, axes)
        axes_of_cost: dict[int, list[str]] = {}
        for key, axis in axes.items():
            axes_of_cost.setdefault(unit_cost(axis), []).append(key)
        random = generator(self.seed, self.label, 0)
        ranks: dict[str, int] = {}
        for keys in axes_of_cost.values():
            order = torch.randperm(len(keys), generator=random).tolist()
            for key, place in zip(keys, order, strict=True):
                ranks[key] = self.ranks[keys[place]]
        return Choice({key: ranks[key] for key in axes})
