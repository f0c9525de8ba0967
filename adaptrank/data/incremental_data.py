"""Data whose classes arrive task after task, for class-incremental learning."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import Subset

from adaptrank._errors import UserError
from adaptrank.data.batch_order import BatchOrder
from adaptrank.data.class_tasks import Tasks, batches_of_task, check_tasks, deal_classes
from adaptrank.data.collate import Batch
from adaptrank.data.labelled_data import SINGLE_LABEL, LabelledData
from adaptrank.data.loader import ResumableLoader
from adaptrank.data.task import Row, Split
from adaptrank.data.task_order import ExamplesByPass, TaskOrder, TaskShare


class IncrementalData(LabelledData):
    """Examples of one class each, whose classes may arrive task after task.

    With `tasks` a run trains on the classes of the first task, then on those of the second, and so
    on. No example of an earlier task comes back. One epoch of the trainer is the whole sequence of
    tasks, so that positions, seeds and resumes are those of any other run. Validation has the
    examples of all classes, and `task_dataloader` those of one task.

    Args:
        tasks: number of tasks, over which the classes are dealt out evenly, or a list with the
            names of the classes of each task. None trains on all classes at once.
        task_seed: seed of the order in which classes are dealt out to tasks. None keeps the order
            of the classes.
        epochs_per_task: passes over the training examples of each task.
        steps_per_task: optimizer steps of each task, instead of passes.
        kwargs: those of `TaskData`.

    Raises:
        UserError: if a number makes no sense, or a class is in two tasks. In `setup`, if a label is
            not one class, a class is in no task or unknown, a task has no training example, or the
            trainer would go through the tasks more than once.
    """

    def __init__(
        self,
        tasks: Tasks | None = None,
        task_seed: int | None = None,
        epochs_per_task: int = 1,
        steps_per_task: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_tasks(tasks, task_seed, epochs_per_task, steps_per_task)
        self.tasks = tasks
        self.task_seed = task_seed
        self.epochs_per_task = epochs_per_task
        self.steps_per_task = steps_per_task
        # Split -> label of each row, in the numbering of the data.
        self._row_labels: dict[Split, list[Any]] = {}

    # ---- the tasks

    @property
    def task_classes(self) -> list[list[str]] | None:
        """Names of the classes of each task, known after `setup`. None without tasks."""
        names = self.class_names
        if self.tasks is None or names is None:
            return None
        return [[names[index] for index in indices] for indices in self._dealt()]

    @property
    def task_of_class(self) -> list[int] | None:
        """Task of each class in the model's numbering, and -1 for a class that the data lack.

        None without tasks.
        """
        classes = self.task_classes
        if classes is None:
            return None
        task_of = {name: task for task, names in enumerate(classes) for name in names}
        return [task_of.get(name, -1) for name in self.model_classes or self.class_names or []]

    def task_steps(self) -> list[int] | None:
        """Return the number of optimizer steps of each task, known after `setup`."""
        if self.tasks is None:
            return None
        accumulated = self._accumulated()
        return [share.batches // accumulated for share in self._shares()]

    def task_dataloader(self, task: int) -> ResumableLoader:
        """Return a loader of the validation examples of one task."""
        indices = self._indices_of("val", set(self._dealt()[task]))
        if not indices:
            names = ", ".join((self.task_classes or [])[task])
            raise UserError(
                f"Task {task + 1} ({names}) has no validation example. Set `stratify: true`, or "
                "give more validation examples."
            )
        examples, collate = self.batched("val")
        order = BatchOrder(
            len(indices), self.eval_batch_size, shuffle=False, **self.share_of_process()
        )
        chosen: Any = Subset(examples, indices)  # type: ignore[arg-type]  # a list suffices
        return ResumableLoader(chosen, collate, order, num_workers=self.num_workers)

    def _dealt(self) -> list[list[int]]:
        """Return the classes of each task, in the numbering of the data."""
        assert self.tasks is not None
        names = self.class_names
        if self.problem != SINGLE_LABEL or names is None:
            raise UserError(
                f"`tasks` deals out classes, and the labels are {self.problem}. Leave it out."
            )
        return deal_classes(names, self.tasks, self.task_seed)

    def _indices_of(self, split: Split, classes: set[int]) -> list[int]:
        """Return the indices of the examples of a split that have one of these classes."""
        self.examples(split)
        labels = self._row_labels[split]
        return [index for index, label in enumerate(labels) if label in classes]

    def _shares(self) -> list[TaskShare]:
        """Return the examples of each task, and its number of batches."""
        world_size = self.share_of_process()["world_size"]
        shares = []
        for task, classes in enumerate(self._dealt()):
            indices = self._indices_of("train", set(classes))
            if not indices:
                names = ", ".join((self.task_classes or [])[task])
                raise UserError(
                    f"Task {task + 1} ({names}) has no training example. Raise `limit_train`, or "
                    "leave its classes out of `classes`."
                )
            batches = batches_of_task(
                len(indices),
                self.batch_size * world_size,
                self.epochs_per_task,
                self.steps_per_task,
                self._accumulated(),
            )
            shares.append(TaskShare(indices, batches))
        return shares

    def _accumulated(self) -> int:
        """Return the number of batches of an optimizer step.

        Raises:
            UserError: if it changes during the run.
        """
        for callback in getattr(self.trainer, "callbacks", None) or ():
            if not isinstance(callback, GradientAccumulationScheduler):
                continue
            if callback.going_to_accumulate_grad_batches():
                raise UserError(
                    "A GradientAccumulationScheduler changes the batches of a step, and tasks need "
                    "a fixed number. Set trainer.accumulate_grad_batches instead."
                )
        return int(getattr(self.trainer, "accumulate_grad_batches", None) or 1)

    # ---- what tasks change

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit":
            self.check_trainer(self.trainer)
        super().setup(stage)
        # A prediction may know the classes from the trained model alone.
        if self.tasks is not None and stage != "predict":
            self._dealt()

    def check_trainer(self, trainer: Any) -> None:
        """Refuse a trainer that goes through the tasks more than once.

        Raises:
            UserError: naming what to set.
        """
        epochs = getattr(trainer, "max_epochs", None)
        is_bounded = epochs == -1 and getattr(trainer, "max_steps", -1) != -1
        if self.tasks is None or epochs is None or epochs == 1 or is_bounded:
            return
        raise UserError(
            f"One epoch of the trainer is the whole sequence of tasks, and trainer.max_epochs is "
            f"{epochs}. Set trainer.max_epochs: 1, and data.init_args.epochs_per_task for the "
            "passes over each task."
        )

    def limit(self, rows: Sequence[Row], split: Split) -> Sequence[Row]:
        kept = super().limit(rows, split)
        if self.tasks is not None:
            self._row_labels[split] = [row.get("label") for row in kept]
        return kept

    def batched(self, split: Split) -> tuple[Sequence[Row], Callable[[Sequence[Row]], Batch]]:
        examples, collate = super().batched(split)
        if self.tasks is not None and split == "train" and hasattr(examples, "at_epoch"):
            return ExamplesByPass(examples), collate
        return examples, collate

    def make_order(self, split: Split, examples: Sequence[Row], **options: Any) -> BatchOrder:
        if self.tasks is None or split != "train":
            return super().make_order(split, examples, **options)
        numbers_passes = isinstance(examples, ExamplesByPass)
        return TaskOrder(self._shares(), numbers_passes=numbers_passes, **options)

    def describe_training(self) -> dict[str, Any]:
        described = super().describe_training()
        if self.tasks is None:
            return described
        steps = {"epochs_per_task": self.epochs_per_task, "steps_per_task": self.steps_per_task}
        return {**described, "tasks": self.task_classes, **steps}
