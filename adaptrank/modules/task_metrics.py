"""Figures of class-incremental learning, from the accuracy matrix over tasks. All are pure.

R[i][j] is the accuracy on task j, counted from 0, after training on task i. It is known for j <= i,
and None where it was not measured.
"""

from collections.abc import Sequence

Row = Sequence[float | None]
Matrix = Sequence[Row]


def average_accuracy(matrix: Matrix) -> float | None:
    """Return the mean accuracy over the tasks seen so far, after the last of them.

    ACC = 1/T sum_j R[T-1][j] (GEM, arXiv:1706.08840). Tasks count alike, whatever their size. None
    if a task was not measured.
    """
    return _mean(matrix[-1]) if matrix else None


def average_incremental_accuracy(matrix: Matrix) -> float | None:
    """Return the mean of the average accuracies after each task, 1/T sum_i mean_{j<=i} R[i][j].

    It is that of iCaRL (arXiv:1611.07725), with tasks that count alike.
    """
    return _mean([_mean(row) for row in matrix])


def forgetting(matrix: Matrix) -> float | None:
    """Return how far tasks have fallen from their best accuracy, the mean over all but the last.

    F = 1/(T-1) sum_{j<T-1} (max_{j<=i<T-1} R[i][j] - R[T-1][j]) (Chaudhry et al.,
    arXiv:1801.10112). It is below 0 where later tasks have helped. None with fewer than two tasks.
    """
    falls = []
    for task in range(len(matrix) - 1):
        earlier = [row[task] for row in matrix[task:-1]]
        known = [value for value in earlier if value is not None]
        last = matrix[-1][task]
        if not known or last is None:
            return None
        falls.append(max(known) - last)
    return _mean(falls)


def backward_transfer(matrix: Matrix) -> float | None:
    """Return what later tasks have done to earlier ones, the mean over all but the last.

    BWT = 1/(T-1) sum_{j<T-1} (R[T-1][j] - R[j][j]) (GEM, arXiv:1706.08840). None with fewer than
    two tasks.
    """
    changes = []
    for task in range(len(matrix) - 1):
        first, last = matrix[task][task], matrix[-1][task]
        if first is None or last is None:
            return None
        changes.append(last - first)
    return _mean(changes)


FIGURES = {
    "average_accuracy": average_accuracy,
    "average_incremental_accuracy": average_incremental_accuracy,
    "forgetting": forgetting,
    "backward_transfer": backward_transfer,
}
"""Name of a figure -> function of the matrix."""


def figures(matrix: Matrix) -> dict[str, float]:
    """Return the figures that are known after the tasks of a matrix, by name."""
    values = {name: function(matrix) for name, function in FIGURES.items()}
    return {name: value for name, value in values.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if there is no value or one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
