"""AdaLoRA: start with too many units, and close the least important as the budget falls."""

from typing import ClassVar, Literal

from adaptrank._options import DECAY
from adaptrank.allocation.plans import Plan, Scores, keep_best
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.schedules import cubic
from adaptrank.allocation.soft_pruning import open_best
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import CostModel


class AdaLoRA(Policy[TrackedTensors]):
    """Prune to a falling budget by smoothed sensitivity times uncertainty.

    The budget is b(t) = floor(b_T + (b_0 - b_T) (1 - p)^3), with p from 0 to 1 between the warm-up
    and the final phase.

    Pruning is soft, as in the paper: an event sets the closing factor of the least important units
    to zero. They keep their slices and their gradients, grow again, and may be chosen at the next
    event. The last event removes closed units physically, so that memory and time fall. With
    `soft=False` every event removes units, and none comes back.

    Scores are running averages over every element w with gradient g, without bias correction:
    I <- b I + (1 - b) |w g| and U <- b U + (1 - b) ||w g| - I|. The score of an element is I U. The
    score of a unit is that of its gate plus the mean over the slice of each factor. The product
    rewards noisy units, and vanishes where training is deterministic. `importance="sensitivity"`
    does not.

    Scores take the weights that gave the gradients, before the step and before clipping. The
    release takes those after the step. In runs of four small layers at a learning rate of 1e-2 that
    changed the mask of one event in nine.

    Source: arXiv:2303.10512; rules from the authors' code. Its README prunes 12 to 8 ranks, with a
    warm-up of 500, a final phase of 1500 and an event every 10 of 3000 steps, betas of 0.85, and an
    orthogonality weight of 0.1 (`SVD(orth=0.1)`). There is no floor: a matrix may lose all of its
    units.

    Args:
        budget: final total in `unit`; None is the total at the start divided by 1.5, as in the
            paper.
        soft: close units until the last event. False removes them at each event.
        importance: score of a unit, any of `scores.IMPORTANCES`.
        beta: decay of the running averages.
        floor: smallest number of units of an axis; 0 as in the authors' code, which chooses among
            all units of the model.
        unit, every, warmup, final, seed: as in `Policy`.
    """

    source = "arXiv:2303.10512"
    ranges: ClassVar = {"beta": DECAY}

    def __init__(
        self,
        budget: int | None = None,
        soft: bool = True,
        importance: str = "sensitivity_uncertainty",
        beta: float = 0.85,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 10,
        warmup: int | float = 0.1,
        final: int | float = 0.3,
        floor: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, None, seed)
        self.soft = soft
        self.importance, self.beta = importance, beta

    def budget_at(self, step: int) -> int:
        start = self.run.start_total
        target = int(start / 1.5) if self.budget is None else self.budget
        return cubic(start, target, self.run.phases.progress(step))

    @property
    def only_prunes(self) -> bool:
        return True

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        closes = self.soft and step < self.run.phases.end
        prune = open_best if closes else keep_best
        return prune(scores, cost, budget, self.floors())
