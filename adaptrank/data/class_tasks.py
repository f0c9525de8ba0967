"""Deal classes out to the tasks of class-incremental learning, and say how long a task trains."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.class_names import show
from adaptrank.data.seeding import seeded_random
from adaptrank.data.task import check_size

Tasks = int | list[list[str | int]]
"""Number of tasks, or the names of the classes of each task."""


def check_tasks(tasks: Any, task_seed: Any, epochs_per_task: Any, steps_per_task: Any) -> None:
    """Check the keys of class-incremental data, before any data are read.

    Raises:
        UserError: naming the key, its value and what fits.
    """
    others = {"task_seed": task_seed, "steps_per_task": steps_per_task}
    unused = [f"{name}={value!r}" for name, value in others.items() if value is not None]
    if epochs_per_task != 1:
        unused.append(f"epochs_per_task={epochs_per_task!r}")
    if tasks is None:
        if unused:
            raise UserError(
                f"{unused[0]} is for classes that arrive in tasks, and there are none. Set "
                "`tasks`, such as tasks: 5, or leave it out."
            )
        return
    if isinstance(tasks, list):
        _check_lists(tasks, task_seed)
    else:
        check_size("tasks", tasks, 2, "is no sequence of tasks")
    check_size("task_seed", task_seed, 0, "is no seed")
    check_size("epochs_per_task", epochs_per_task, 1, "trains on nothing")
    check_size("steps_per_task", steps_per_task, 1, "trains on nothing")
    if steps_per_task is not None and epochs_per_task != 1:
        raise UserError(
            f"epochs_per_task={epochs_per_task} and steps_per_task={steps_per_task} both say how "
            "long a task trains. Leave one of the two out."
        )


def _check_lists(tasks: list[Any], task_seed: Any) -> None:
    """Check tasks that are given as lists of classes."""
    if len(tasks) < 2 or not all(isinstance(names, list) and names for names in tasks):
        raise UserError(
            f"tasks={tasks!r} has to be a number from 2 on, or a list of two or more lists of "
            "classes, such as tasks: [[cat, dog], [car, bus]]."
        )
    if task_seed is not None:
        raise UserError(
            f"task_seed={task_seed} deals classes out to tasks, and `tasks` lists the classes of "
            "each. Leave one of the two out."
        )
    named = [str(name) for names in tasks for name in names]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"tasks names the class {twice!r} twice. A class belongs to one task.")


def deal_classes(names: Sequence[str], tasks: Tasks, seed: int | None) -> list[list[int]]:
    """Return the indices of the classes of each task, in the order of the tasks.

    Args:
        names: names of all classes.
        tasks: number of tasks, or the names of the classes of each. Of a number the first tasks get
            one class more where it does not divide the number of classes.
        seed: seed of the order in which classes are dealt out. None keeps their own order.

    Raises:
        UserError: if a task has fewer than two classes, a name is unknown, or a class is in no
            task.
    """
    if not isinstance(tasks, int):
        dealt = _named_classes(names, tasks)
    else:
        order = list(range(len(names)))
        if seed is not None:
            seeded_random("tasks", seed).shuffle(order)
        borders = _borders(len(names), tasks)
        dealt = [sorted(order[low:high]) for low, high in pairwise(borders)]
    small = next((number for number, task in enumerate(dealt, 1) if len(task) < 2), None)
    if small is not None:
        raise UserError(
            f"Task {small} of {len(dealt)} has {len(dealt[small - 1])} class(es) of the "
            f"{len(names)} {show(list(names))}. A task chooses among its own classes, so it needs "
            "two or more. Ask for fewer tasks."
        )
    return dealt


def _borders(classes: int, tasks: int) -> list[int]:
    """Return where tasks begin in a list of classes, and its end."""
    size, larger = divmod(classes, tasks)
    return [task * size + min(task, larger) for task in range(tasks + 1)]


def _named_classes(names: Sequence[str], tasks: Sequence[Sequence[str | int]]) -> list[list[int]]:
    """Return the indices of classes that are named task by task."""
    known = list(names)
    dealt = []
    for number, named in enumerate(tasks, 1):
        for name in map(str, named):
            if name not in known:
                raise UserError(
                    f"Task {number} of `tasks` names {name!r}, which is none of the classes "
                    f"{show(list(names))}.{did_you_mean(name, known)}"
                )
        dealt.append([known.index(str(name)) for name in named])
    taken = {index for indices in dealt for index in indices}
    left = [name for index, name in enumerate(names) if index not in taken]
    if left:
        raise UserError(
            f"`tasks` names {len(taken)} of {len(names)} classes, and {show(left)} are in none. "
            "Put each class into a task."
        )
    return dealt


def batches_of_task(
    examples: int, per_batch: int, epochs: int, steps: int | None, accumulated: int
) -> int:
    """Return the number of batches of a task, a multiple of those of an optimizer step.

    So no optimizer step has batches of two tasks. A task of whole epochs goes on into the next one
    where its last step would have too few batches.

    Args:
        examples: training examples of the task.
        per_batch: examples of a batch, in all processes together.
        epochs: passes over the examples.
        steps: optimizer steps, instead of passes.
        accumulated: batches of an optimizer step.
    """
    if steps is None:
        steps = math.ceil(epochs * math.ceil(examples / per_batch) / accumulated)
    return steps * accumulated
