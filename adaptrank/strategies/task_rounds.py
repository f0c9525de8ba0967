"""TaskRounds: rounds that are the tasks of class-incremental learning."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from adaptrank._errors import UserError
from adaptrank.strategies.rounds import Rounds
from adaptrank.strategies.strategy import TrainingStrategy

SCHEDULES = ("constant", "linear", "cosine")


class TaskRounds(TrainingStrategy, registered=False):
    """Base of strategies with one round for each task, which begins with a fresh optimizer state.

    The data module says how long each task trains, or `steps_per_task` does. The learning rate of
    the run is multiplied by a factor that starts at 1 in each task. In step t of L it is 1 for
    "constant", 1 - t / L for "linear", and (1 + cos(pi t / L)) / 2 for "cosine", with t from 0.

    Args:
        steps_per_task: optimizer steps of each task, for data without `tasks`.
        schedule: factor of the learning rate within a task: "constant", "linear" or "cosine".
        seed: seed of fresh tensors.
    Raises:
        UserError: if a number of steps is below 1, or the schedule is unknown.
    """

    rounds_of_data = True

    def __init__(
        self,
        *,
        steps_per_task: list[int] | None = None,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if schedule not in SCHEDULES:
            raise UserError(f"schedule={schedule!r} is unknown; use one of {', '.join(SCHEDULES)}.")
        if steps_per_task is not None and (not steps_per_task or min(steps_per_task) < 1):
            raise UserError(
                f"steps_per_task={steps_per_task} has to be a list of steps, each 1 or more, such "
                f"as [100, 100]."
            )
        self.steps_per_task, self.schedule = steps_per_task, schedule
        self._steps_of_data: Sequence[int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the data how long each task trains, and prepare the model."""
        super().setup(trainer, pl_module, stage)
        task_steps = getattr(getattr(trainer, "datamodule", None), "task_steps", None)
        self._steps_of_data = task_steps() if task_steps is not None and stage == "fit" else None
        if self._steps_of_data is not None and self.steps_per_task is not None:
            raise UserError(
                f"{self.label} has steps_per_task={self.steps_per_task}, and the data have tasks "
                f"of their own; leave it out."
            )

    def rounds(self, total_steps: int) -> Rounds:
        steps = self.steps_per_task or self._steps_of_data
        if steps is None:
            raise UserError(
                f"{self.label} trains task after task, and this run has no tasks; set "
                f"data.init_args.tasks, such as tasks: 5, or give steps_per_task."
            )
        return Rounds.at(list(accumulate(steps))[:-1], total_steps)

    def enter(self, number: int) -> None:
        if number > 0:
            self.forget(self.run.optimized())
            self.run.forget_scores()

    def rate(self, steps_done: int, group: Mapping[str, Any]) -> float:
        rounds = self.run.rounds
        number = rounds.number(steps_done)
        done = (steps_done - rounds.start(number)) / max(1, rounds.length(number))
        if self.schedule == "linear":
            return 1 - done
        return (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1.0
