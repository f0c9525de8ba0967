"""Contract of a score: importance of each unit, by name. Higher is kept.

A score sees the run through `Run`. Running averages live in tensors that `Run.track` hands out.
They follow the axis through every resize and into the checkpoint, and a fresh unit starts at zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from adaptrank._errors import UserError, did_you_mean
from adaptrank.axes import RankAxis

Axes = Mapping[str, RankAxis]
"""axis key -> rank axis."""

Scores = Mapping[str, Tensor]
"""axis key -> importance of its units, (units,)."""

Where = int | None | Sequence[tuple[str, int]]
"""Dimension of a running tensor that counts the units of its axis.

None if no dimension does. Pairs of (axis key, dimension) if the tensor follows several axes.
"""


class Track(Protocol):
    """Function (name, tensor, where) that returns the running tensor of that name.

    `tensor` is its start if there is none yet.
    """

    def __call__(self, name: str, tensor: Tensor, where: Where = 0) -> Tensor: ...


class Run(Protocol):
    """View of a run that a score receives."""

    beta: float
    """Decay of running averages."""
    seed: int
    """Seed of random scores."""
    model: nn.Module

    @property
    def examples(self) -> Sequence[Any]:
        """Training batches, as many as the score asks for, the same all through the run."""

    @property
    def steps_done(self) -> int:
        """Number of optimizer steps so far."""

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch in evaluation mode, with a graph if gradients are on."""

    def track(self, axis: RankAxis, name: str, tensor: Tensor, where: Where = 0) -> Tensor:
        """Return a running tensor of the axis, which starts as `tensor`."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes."""


@dataclass(frozen=True)
class Importance:
    """A score for all axes at once, and what it observes at each step.

    Args:
        score: (axes, run) -> {axis: (units,)}, in float32 or better.
        observe: (axes, run) -> None. It updates running averages when the gradients of a step are
            complete and the step is not made yet.
        examples: number of training batches in `run.examples` that the loss is evaluated on.
        refuses: axes -> why the score does not fit them, as a sentence without its end, or "" if
            it fits. It is asked at the start of a run.
    """

    score: Callable[[Axes, Run], Scores]
    observe: Callable[[Axes, Run], None] | None = None
    examples: int = 0
    refuses: Callable[[Axes], str] = lambda axes: ""


IMPORTANCES: dict[str, Importance] = {}
"""Scores by name. Each file of this folder adds its own, and users may add theirs.

Any name with "_per_cost" appended is that score over the trainable numbers of the unit.
"""


def importance(name: str) -> Importance:
    """Return a score by its name.

    Raises:
        UserError: for an unknown name. The nearest one is suggested.
    """
    plain = name.removesuffix("_per_cost")
    if plain not in IMPORTANCES:
        raise UserError(
            f"importance={name!r} is no score.{did_you_mean(plain, IMPORTANCES)} There are "
            f"{', '.join(IMPORTANCES)}, each also with _per_cost appended."
        )
    score = IMPORTANCES[plain]
    if plain == name:
        return score
    return per_cost(score)


def per_cost(score: Importance) -> Importance:
    """Return the score divided by the cost of the unit."""

    def scores(axes: Axes, run: Run) -> Scores:
        values = score.score(axes, run)
        return {key: values[key] / unit_cost(axes[key]) for key in values}

    return replace(score, score=scores)


def unit_cost(axis: RankAxis) -> int:
    """Return the trainable numbers of one unit, at the present sizes of the other axes.

    It is at least 1: beside an axis without units a unit may hold no number.
    """
    numbers = 0
    for slot in axis.slots():
        if slot.tensor.requires_grad:
            numbers += slot.tensor.movedim(slot.dim, 0).shape[1:].numel()
    return max(numbers, 1)


def each(score: Callable[[RankAxis, Track], Tensor]) -> Callable[[Axes, Run], Scores]:
    """Return a score of all axes, made from a score of one axis."""

    def scores(axes: Axes, run: Run) -> Scores:
        return {key: score(axis, partial(run.track, axis)) for key, axis in axes.items()}

    return scores
