"""Sequential fine-tuning: one task after the other, with nothing against forgetting."""

from adaptrank.strategies.task_rounds import TaskRounds


class SequentialTasks(TaskRounds):
    """Trains one adapter on one task after the other, and does nothing against forgetting.

    It is the baseline of class-incremental learning. Each task has a fresh optimizer state and a
    learning rate of its own, as under `SDLoRA`. Without this strategy the moments of the optimizer
    go on over the border of two tasks, so that rows of the head of earlier classes move on for some
    steps.

    Source: the baseline "single" of GEM, arXiv:1706.08840, on any adapter.
    Args:
        steps_per_task, schedule, seed: as in `TaskRounds`.
    """

    source = "arXiv:1706.08840"
