"""Classes that arrive in tasks: which outputs of a head a loss and a prediction may use.

The head has an output for each class from the start. This is the same as a head that grows: an
output that is masked gets a gradient of exactly zero, so its row keeps its fresh values until its
task begins, and the draw of a row does not depend on when it is made.
"""

from collections.abc import Collection

import torch
from torch import Tensor

OTHER = -float("inf")
"""Output of a class that is left out."""


def only_own_task(output: Tensor, labels: Tensor, task_of_class: Tensor) -> Tensor:
    """Return outputs with -inf at the classes of other tasks than that of the row's label.

    Args:
        output: (N, classes).
        labels: (N,) classes. A row with -100 counts as one of class 0.
        task_of_class: (classes,) task of each class.
    """
    # A plan computes with tensors without values, and the buffer of the module has some.
    task_of_class = task_of_class.to(output.device)
    task = task_of_class.index_select(0, labels.clamp(min=0).flatten())
    return output.masked_fill(task_of_class != task[:, None], OTHER)


def only_seen(output: Tensor, task_of_class: Tensor, tasks: int) -> Tensor:
    """Return outputs with -inf at the classes of tasks that have not begun.

    Args:
        output: (N, classes).
        task_of_class: (classes,) task of each class, -1 for a class of no task.
        tasks: number of tasks that have begun.
    """
    return output.masked_fill(task_of_class >= tasks, OTHER)


def as_tensor(task_of_class: Collection[int] | None, device: torch.device) -> Tensor | None:
    """Return the task of each class as a tensor, or None without tasks."""
    return None if task_of_class is None else torch.tensor(task_of_class, device=device)
