"""ReLoRA: merge and restart at fixed intervals, with a learning rate that warms up again."""

from collections.abc import Mapping
from typing import Any, Literal

from adaptrank._errors import UserError
from adaptrank._options import COUNT, NOT_NEGATIVE, Range
from adaptrank.axes import generator, prune_moments
from adaptrank.strategies.merge_and_restart import MergeAndRestart
from adaptrank.strategies.rounds import Rounds


class ReLoRA(MergeAndRestart):
    """Merges the update every `every` optimizer steps, and starts a new one of the same rank.

    After n cycles of rank r the rank of the whole change is up to n r. At a restart the learning
    rate is zero, and rises linearly to the user's schedule within `restart_warmup` steps: in step
    t of a cycle it is schedule * min(1, t / restart_warmup), with t counted from 0. The first cycle
    has the warm-up of the user's schedule alone. The last cycle may be shorter.

    The optimizer's moments are reset, by one of three rules. "full" deletes them with the step
    counter. "magnitude" sets the smallest share `prune` of each moment to zero, and "random" a
    random share. These two keep the step counter, as the released code does. So the first step of
    a pruned entry is up to (1 - beta1) / sqrt(1 - beta2) learning rates long, which is 3.2 for
    Adam's defaults: give them a long warm-up. An entry that loses its second moment loses its first
    one too. This is a departure. The release prunes the two apart, and where only the first is
    left, Adam divides it by epsilon: steps of millions of learning rates were measured.

    Source: arXiv:2307.05695. Cycles of 1000 steps and 100 steps of warm-up are those of the
        released configuration for pretraining, which prunes 0.8 of each moment by magnitude for
        the 1B model. A full reset is the default here, because fine-tuning has short cycles. The
        paper's full-rank warm start is for pretraining, and is left out.
    Args:
        every: optimizer steps of a cycle.
        restart_warmup: steps in which the learning rate rises after a restart.
        reset: "full", "magnitude" or "random".
        prune: share of each moment that "magnitude" and "random" set to zero.
        seed: seed of the fresh tensors and of random pruning.
    Raises:
        UserError: if the warm-up is not shorter than a cycle, or the reset is unknown.
    """

    source = "arXiv:2307.05695"
    ranges = {"every": COUNT, "restart_warmup": NOT_NEGATIVE, "prune": Range(0, 1)}

    def __init__(
        self,
        *,
        every: int = 1000,
        restart_warmup: int = 100,
        reset: Literal["full", "magnitude", "random"] = "full",
        prune: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if reset not in ("full", "magnitude", "random"):
            raise UserError(f"reset={reset!r} is unknown; use 'full', 'magnitude' or 'random'.")
        if restart_warmup >= every:
            raise UserError(
                f"restart_warmup={restart_warmup} is not shorter than a cycle of every={every} "
                f"steps; shorten it, or lengthen the cycle."
            )
        self.every, self.restart_warmup = every, restart_warmup
        self.reset, self.prune = reset, prune

    def rounds(self, total_steps: int) -> Rounds:
        return Rounds.of_length(self.every, total_steps)

    def forget(self, tensors: list[Any]) -> None:
        if self.reset == "full":
            super().forget(tensors)
            return
        random = generator(self.seed, "moments", self.run.number)
        prune_moments(tensors, self.run.optimizers, self.prune, self.reset, random)

    def rate(self, steps_done: int, group: Mapping[str, Any]) -> float:
        cycle, step = divmod(steps_done, self.every)
        if cycle == 0 or step >= self.restart_warmup:
            return 1.0
        return step / self.restart_warmup
