"""Weights, gradients and losses -> importance of each unit. Higher is kept; all in float32 or better.

A running score keeps its averages in tensors that the allocator's `track` hands out: they follow the axis through every
resize and into the checkpoint, and a fresh unit starts at zero.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptrank.axes import RankAxis, Slot

Axes = Mapping[str, RankAxis]
Scores = Mapping[str, Tensor]


class Track(Protocol):
    """(name, tensor, dim) -> the running tensor of that name; `tensor` is its start if there is none yet."""

    def __call__(self, name: str, tensor: Tensor, dim: int = 0) -> Tensor: ...


class Run(Protocol):
    """What a score sees of the run that it scores: an allocator is one."""

    beta: float
    seed: int

    @property
    def examples(self) -> Sequence[Any]:
        """As many training batches as the score asks for; the same all through the run."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps."""

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch, in evaluation mode; the mean over its examples, with a graph where gradients are on."""

    def track(self, axis: RankAxis, name: str, tensor: Tensor, dim: int = 0) -> Tensor:
        """A running tensor of the axis."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""


@dataclass(frozen=True)
class Importance:
    """A score and what it observes at each step, for all axes at once.

    Args:
        score: (axes, run) -> {axis: (units,)}.
        observe: (axes, run) -> nothing; updates running averages, with gradients complete and the step not made.
        examples: training batches that it evaluates the loss on, `run.examples`.
    """

    score: Callable[[Axes, Run], Scores]
    observe: Callable[[Axes, Run], None] | None = None
    examples: int = 0


def magnitude(axis: RankAxis) -> Tensor:
    """Product over the factors of the unit's Frobenius norm: (units,). The norm of the unit, where it is a rank-one term."""
    norms = axis.per_unit(lambda slot: slot.tensor.detach() if slot.tensor.is_floating_point() else None, "norm")
    return torch.stack(list(norms.values())).prod(0)


def gate(axis: RankAxis) -> Tensor:
    """|dL/dg| of a virtual gate g = 1 on each unit, from the gradients of this step: (units,).

    Zero where the layer took no part in the forward, as BERT's pooler takes none in a masked language model.
    """
    closing = axis.closing()
    if all(slot.tensor.grad is None for slot in closing):
        return closing[0].tensor.new_zeros(len(axis))
    return axis.gate_grad().abs()


def triplet(axis: RankAxis, per_element: Callable[[Slot], Tensor | None], gate_value: Tensor) -> Tensor:
    """AdaLoRA's sum (arXiv:2303.10512): the gate's importance plus the mean over each factor's slice.

    Where the closing factor is one number a unit (the SVD form) it is the gate, and is not counted twice.
    """

    def factors(slot: Slot) -> Tensor | None:
        return None if slot.closes and slot.tensor.dim() == 1 else per_element(slot)

    means = axis.per_unit(factors, "mean").values()
    return gate_value + sum(means, torch.zeros_like(gate_value))


def update_average(average: Tensor, value: Tensor, beta: float) -> Tensor:
    """average <- beta average + (1 - beta) value, in place; no bias correction, as in the released codes."""
    return average.mul_(beta).add_(value, alpha=1 - beta)


def _observe_gate(axis: RankAxis, track: Track, beta: float) -> None:
    value = gate(axis)
    update_average(track("gate", torch.zeros_like(value)), value, beta)


def _gate_average(axis: RankAxis, track: Track) -> Tensor:
    return track("gate", torch.zeros(len(axis), device=axis.slots()[0].tensor.device))


def _observe_elements(axis: RankAxis, track: Track, beta: float) -> None:
    """I <- EMA of |w g|, U <- EMA of ||w g| - I|, with I already updated; for every element, and for the gate."""
    streams: list[tuple[str, Tensor, int]] = [("gate", gate(axis), 0)]
    for slot in axis.slots():
        if slot.tensor.grad is not None and not (slot.closes and slot.tensor.dim() == 1):
            streams.append((slot.label, (slot.tensor.detach() * slot.tensor.grad).abs(), slot.dim))
    for name, value, dim in streams:
        average = update_average(track(f"I.{name}", torch.zeros_like(value), dim), value, beta)
        update_average(track(f"U.{name}", torch.zeros_like(value), dim), (value - average).abs(), beta)


def _elementwise(uncertainty: bool) -> Callable[[RankAxis, Track], Tensor]:
    def score(axis: RankAxis, track: Track) -> Tensor:
        def importance(name: str, like: Tensor, dim: int) -> Tensor:
            average = track(f"I.{name}", torch.zeros_like(like), dim)
            return average * track(f"U.{name}", torch.zeros_like(like), dim) if uncertainty else average

        first = axis.slots()[0].tensor
        units = importance("gate", torch.zeros(len(axis), device=first.device), 0)
        return triplet(
            axis,
            lambda s: importance(s.label, s.tensor.detach(), s.dim) if s.tensor.requires_grad else None,
            units,
        )

    return score


def each(score: Callable[[RankAxis, Track], Tensor]) -> Callable[[Axes, Run], Scores]:
    """A score of one axis, for all of them."""

    def scores(axes: Axes, run: Run) -> Scores:
        return {key: score(axis, partial(run.track, axis)) for key, axis in axes.items()}

    return scores


def at_each(observe: Callable[[RankAxis, Track, float], None]) -> Callable[[Axes, Run], None]:
    """What is observed of one axis, for all of them."""

    def observe_all(axes: Axes, run: Run) -> None:
        for axis in axes.values():
            observe(axis, partial(run.track, axis), run.beta)

    return observe_all


IMPORTANCES: dict[str, Importance] = {
    "magnitude": Importance(each(lambda axis, track: magnitude(axis))),
    "gate": Importance(each(_gate_average), at_each(_observe_gate)),
    "sensitivity": Importance(each(_elementwise(uncertainty=False)), at_each(_observe_elements)),
    "sensitivity_uncertainty": Importance(each(_elementwise(uncertainty=True)), at_each(_observe_elements)),
}
"""Scores by name. "gate" keeps 1 float a unit, the sensitivities 2 floats a trainable number. Any name with "_per_cost" appended
is that score over the unit's trainable numbers."""


def importance(name: str) -> Importance:
    """A score by its name.

    Raises:
        ValueError: for an unknown one; the nearest is named.
    """
    plain = name.removesuffix("_per_cost")
    if plain not in IMPORTANCES:
        close = difflib.get_close_matches(plain, IMPORTANCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"importance={name!r} is no score.{hint} There are {', '.join(IMPORTANCES)}, each also with _per_cost appended."
        )
    found = IMPORTANCES[plain]
    return found if plain == name else per_cost(found)


def per_cost(score: Importance) -> Importance:
    """The score over what the unit costs: its trainable numbers, in all tensors of its axis."""

    def scores(axes: Axes, run: Run) -> Scores:
        return {key: values / unit_cost(axes[key]) for key, values in score.score(axes, run).items()}

    return replace(score, score=scores)


def unit_cost(axis: RankAxis) -> int:
    """Trainable numbers of one unit, at the sizes that other axes have now."""
    return sum(slot.tensor.numel() // len(axis) for slot in axis.slots() if slot.tensor.requires_grad)
