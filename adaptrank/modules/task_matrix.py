"""The accuracy matrix over tasks: measured at the end of each task, logged, and written."""

import itertools
import logging
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from adaptrank._collectives import total
from adaptrank._errors import UserError
from adaptrank._files import write_json
from adaptrank.artifacts.run import RunFiles
from adaptrank.modules.task_classes import only_seen
from adaptrank.modules.task_metrics import figures
from adaptrank.strategies import strategy_of
from adaptrank.training.evaluation import evaluating

if TYPE_CHECKING:
    from adaptrank.modules.label_module import LabelModule

log = logging.getLogger("adaptrank")

FILE = "tasks.json"
"""File of a run folder with the matrix."""

PREFIX = "tasks/"
"""Beginning of the names of all figures in the log."""


class TaskMatrix(Callback):
    """Measures the accuracy on all tasks seen so far at the end of each task.

    Predictions choose among all classes seen so far. The row of a task is measured after the
    allocator has acted on its last step, and before a training strategy begins the next task. Data
    modules with `tasks` bring it along.

    The rows are in checkpoints, so that a resumed run has the whole matrix.
    """

    def __init__(self) -> None:
        self.rows: list[list[float | None]] = []
        """R[i][j], the accuracy on task j after task i, for j <= i."""
        self.examples: list[int] = []
        """Number of validation examples of each task."""
        self.ends: list[int] = []
        """Optimizer steps at the end of each task."""

    @property
    def figures(self) -> dict[str, float]:
        """Average accuracy, forgetting and others, by their names in the log."""
        return {f"{PREFIX}{name}": value for name, value in figures(self.rows).items()}

    # ---- Lightning

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read how long each task trains, and check that the run goes through them once.

        Raises:
            UserError: if the run is longer than all tasks.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.ends = list(itertools.accumulate(data.task_steps()))
        planned = trainer.estimated_stepping_batches
        if trainer.max_steps != -1:
            planned = min(planned, trainer.max_steps)
        if planned > self.ends[-1]:
            raise UserError(
                f"The tasks have {self.ends[-1]} optimizer steps, and the run has {planned}. Set "
                "trainer.max_epochs: 1 and leave trainer.max_steps out, and lengthen tasks by "
                "data.init_args.epochs_per_task or steps_per_task."
            )
        if planned < self.ends[-1]:
            tasks = bisect_right(self.ends, planned)
            log.warning(
                "The run ends after %d of %d steps, with %d of %d tasks trained whole.",
                planned,
                self.ends[-1],
                tasks,
                len(self.ends),
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure a row if the batch completed the last step of a task."""
        done = bisect_right(self.ends, trainer.global_step)
        if done <= len(self.rows) or not trainer.limit_val_batches:
            return
        # A checkpoint from a run without this callback has no earlier rows.
        while len(self.rows) < done - 1:
            self.rows.append([None] * (len(self.rows) + 1))
        module: Any = pl_module
        with evaluating(module):
            counts = [self._count(trainer, module, task, done) for task in range(done)]
        self.rows.append([right / examples for right, examples in counts])
        self.examples = [examples for _, examples in counts]
        self._log(trainer, pl_module)

    def _count(
        self, trainer: Trainer, module: "LabelModule", task: int, seen: int
    ) -> tuple[int, int]:
        """Return how many examples of a task are right, and how many there are."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.task_dataloader(task)
        limit: int | float = trainer.limit_val_batches
        batches = limit if isinstance(limit, int) else max(1, int(limit * len(loader)))
        counts = torch.zeros(2, dtype=torch.long, device=module.device)
        for batch in itertools.islice(loader, batches):
            moved = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.val_step_context():
                counts += count_right(module, moved, seen)
        right, examples = total(counts)[0].tolist()
        return right, examples

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures of the last row, and write the matrix where the run has a folder."""
        row = self.rows[-1]
        values = self.figures
        for task, accuracy in enumerate(row, 1):
            if accuracy is not None:
                values[f"{PREFIX}accuracy_{task}"] = accuracy
        # The figures of an epoch would be means over its tasks.
        pl_module.log_dict(values, on_step=True, on_epoch=False, logger=False)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFiles):
                write_json(callback.folder / FILE, self.describe(trainer))

    def describe(self, trainer: Trainer) -> dict[str, Any]:
        """Return the contents of tasks.json."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return {
            "classes": data.task_classes,
            "steps": self.ends,
            "examples": self.examples,
            "accuracy": self.rows,
            "figures": figures(self.rows),
        }

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, and the numbers of examples."""
        return {"rows": self.rows, "examples": self.examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of a checkpoint."""
        self.rows = [list(row) for row in state_dict["rows"]]
        self.examples = list(state_dict["examples"])


@torch.no_grad()
def count_right(module: "LabelModule", batch: Any, tasks: int) -> Tensor:
    """Return how many examples of a batch are right, and how many have a label, (2,).

    Args:
        module: the classifier.
        batch: a batch on its device.
        tasks: number of tasks that have begun.
    """
    output, labels = module.labelled_outputs(batch)
    if module.task_of_class is not None:
        output = only_seen(output, module.task_of_class, tasks)
    right = (module.problem.decide(output) == labels).sum()
    return torch.stack([right, torch.full_like(right, len(labels))])


def ensure_task_matrix(trainer: Trainer, schedule: str) -> None:
    """Put the callback into a trainer whose data have tasks, unless it is there.

    It comes after the allocators, and before a training strategy and all checkpoints. The list is
    replaced, not changed: Lightning may be iterating over it.

    Args:
        trainer: the trainer.
        schedule: schedule of the learning rate, for a warning.
    """
    data = getattr(trainer, "datamodule", None)
    if getattr(data, "task_classes", None) is None:
        return
    if schedule != "constant":
        log.warning(
            "model.schedule is %s: the learning rate falls over the whole sequence of tasks, so "
            "that the last ones learn least. Set model.schedule: constant.",
            schedule,
        )
    present = task_matrix(trainer)
    if present is not None:
        # Rows of an earlier run. Those of a checkpoint are loaded later.
        present.rows = []
        return
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    strategy = strategy_of(trainer)
    places = [
        place
        for place, callback in enumerate(callbacks)
        if callback is strategy or isinstance(callback, Checkpoint)
    ]
    place = min(places, default=len(callbacks))
    trainer.callbacks = [*callbacks[:place], TaskMatrix(), *callbacks[place:]]  # type: ignore[attr-defined]


def task_matrix(trainer: Trainer) -> TaskMatrix | None:
    """Return the accuracy matrix of a run, or None if its data have no tasks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, TaskMatrix)), None)
