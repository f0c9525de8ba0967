"""DynamicRank: prune to a falling budget by the Frobenius norm of each unit's update."""

from typing import Literal

from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation.context import Axes
from adaptrank.allocation.plans import Scores
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.schedules import cubic
from adaptrank.allocation.scores.elements import zeros
from adaptrank.allocation.scores.gradient import magnitude
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import RankAxis


class UnitShares(TrackedTensors):
    """Running share of each unit in the norm of its layer's update."""

    def share(self, axis: RankAxis, like: Tensor) -> Tensor:
        """Return the running shares of an axis, (units,); they start at zero."""
        return self.track(axis, "share", zeros(like))


class DynamicRank(Policy[UnitShares]):
    """Prune the units whose share in the norm of their layer's update is smallest.

    The update of a layer is a sum of units, D = sum_i D_i. The score of a unit is a running average
    s <- b s + (1 - b) |D_i| / |D|, with Frobenius norms, and |D|^2 taken as sum_i |D_i|^2. For a
    rank-one unit |D_i| is the product of the norms of its factors. The budget falls on a cubic
    curve from the total at the start to `budget`. Pruned units are removed physically.

    No gradient is needed, so the score costs next to nothing. A unit that is alone in its layer has
    a share of 1. So a layer loses its last unit only if the budget is below the number of layers.

    Source: arXiv:2405.17357 ("DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank
    Distribution"), from its abstract and summaries. The decay of 0.9 and the start of 1.5 times the
    final budget are recalled, and not verified. In the paper |D| is the norm of the sum. Its
    penalty on the variance of the factors is left out. The name avoids confusion with the
    parameterization DoRA.

    Args:
        budget: final total in `unit`; None is the total at the start divided by 1.5.
        beta: decay of the running average, from 0 to below 1.
        floor: smallest number of units of an axis; 0, since the abstract and the summaries name no
            floor for the components that are pruned.
        unit, every, warmup, final, seed: as in `Policy`.
    Raises:
        ValueError: for a decay out of range.
    """

    source = "arXiv:2405.17357"

    def __init__(
        self,
        budget: int | None = None,
        beta: float = 0.9,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 10,
        warmup: int | float = 0.1,
        final: int | float = 0.3,
        floor: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, None, seed)
        if not 0 <= beta < 1:
            raise UserError(f"beta={beta}: the decay is from 0 to below 1; use 0.9.")
        self.beta = beta

    def init_state(self, axes: Axes) -> UnitShares:
        return UnitShares()

    def update(self, state: UnitShares, axes: Axes) -> None:
        for axis in axes.values():
            norms = magnitude(axis)
            share = norms / norms.norm().clamp_min(1e-12)
            state.share(axis, share).lerp_(share, 1 - self.beta)

    def score_units(self, state: UnitShares, axes: Axes) -> Scores:
        return {key: state.share(axis, magnitude(axis)) for key, axis in axes.items()}

    def budget_at(self, step: int) -> int:
        start = self.run.start_total
        target = int(start / 1.5) if self.budget is None else self.budget
        return cubic(start, target, self.run.phases.progress(step))
