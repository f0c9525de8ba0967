"""ALoRA: units that the model does not miss are pruned, and layers that lost none grow."""

from collections.abc import Mapping
from typing import Literal

from adaptrank._errors import UserError
from adaptrank.allocation.checks import check_can_prune
from adaptrank.allocation.plans import Plan, Scores, reallocate
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.schedules import steps
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import CostModel


class ALoRA(Policy[TrackedTensors]):
    """Ablate every unit, prune the least important ones, and let untouched axes grow.

    The score of a unit is IS(u) = S(only u) - S(without u), with S the negative loss on fixed
    examples. A round prunes the `units` lowest of all axes. The axes that lost none share as many
    fresh units, in equal shares, and a remainder by mean score. If every axis lost one nothing is
    added, so the total never exceeds that of the start, and may shrink. Fresh units change nothing
    (in the paper they are random; this is a decision of this library).

    "Only u" means that every other unit of the whole model is off. That takes two forward passes
    for each unit and round. The part before the unit's block is computed once.
    `importance="ablation_first_order"` takes two backward passes in all. The examples are the first
    training batches, which are trained on as well. They are never those that are reported on.

    Not to be confused with the parameterization ALoRE. Source: arXiv:2403.16187 (method, settings
    and main tables were read; no official code was found): rank 8, a round prunes one unit for
    every module, 32 examples, the first round after one epoch, then every quarter of one, 8
    rounds. Whether the paper's totals are for a block or the model is ambiguous. Its parameter
    counts fit 8 units in every module.

    Args:
        units: units to prune in a round; an integer, or a fraction of all.
        rounds: largest number of rounds.
        importance: score of a unit, any of `scores.IMPORTANCES`.
        batches: training batches that a score which evaluates the loss is averaged over. The score
            of one batch with few examples is noisy.
        unit: what is never exceeded, "ranks" or "parameters".
        floor: smallest number of units of an axis; 0, since the paper names none. An axis without
            units lost none in a round, and so takes part in the shares, after all others.
        every, warmup, final, cap, seed: as in `Policy`.
    Raises:
        ValueError: for units, rounds or batches out of range; at the start, if every axis is at
            its floor, or for exact ablation of too many units.
    """

    source = "arXiv:2403.16187"
    requires = frozenset({"grow"})
    exact = False

    def __init__(
        self,
        units: int | float = 0.125,
        rounds: int = 8,
        importance: str = "ablation",
        batches: int = 1,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 50,
        warmup: int | float = 0.2,
        final: int | float = 0.3,
        floor: int = 0,
        cap: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(None, unit, every, warmup, final, floor, cap, seed)
        fraction_above_one = isinstance(units, float) and units > 1
        if units <= 0 or fraction_above_one or rounds < 1 or batches < 1:
            raise UserError(
                f"units={units}, rounds={rounds}, batches={batches}: prune at least one unit, or a "
                f"fraction up to 1.0, in at least one round, on at least one batch."
            )
        self.units, self.rounds, self.importance, self.count = units, rounds, importance, batches

    def budget_at(self, step: int) -> int:
        return self.run.start_total

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        if not self.acts_at(step):
            return {}
        all_units = sum(map(len, scores.values()))
        pruned = max(1, steps(self.units, all_units))
        return reallocate(scores, cost, budget, pruned, self.floors(), self.caps())

    def acts_at(self, step: int) -> bool:
        return step in self.run.phases.events()[: self.rounds]

    def examples_needed(self) -> int:
        return self.count if super().examples_needed() else 0

    def check_start(self, sizes: Mapping[str, int]) -> None:
        check_can_prune(self, sizes)
