"""Weights, gradients and losses -> importance of each unit. Higher is kept; all in float32 or better.

A running score keeps its averages in tensors that the allocator's `track` hands out: they follow the axis through every
resize and into the checkpoint, and a fresh unit starts at zero.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.axes import RankAxis, Slot, generator

Axes = Mapping[str, RankAxis]
Scores = Mapping[str, Tensor]


Where = int | None | Sequence[tuple[str, int]]
"""The dimension of a running tensor that counts the units of its axis; or None; or (axis key, dimension) for each that it follows."""


class Track(Protocol):
    """(name, tensor, where) -> the running tensor of that name; `tensor` is its start if there is none yet."""

    def __call__(self, name: str, tensor: Tensor, where: Where = 0) -> Tensor: ...


class Run(Protocol):
    """What a score sees of the run that it scores: an allocator is one."""

    beta: float
    seed: int
    model: nn.Module

    @property
    def examples(self) -> Sequence[Any]:
        """As many training batches as the score asks for; the same all through the run."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps."""

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch, in evaluation mode; the mean over its examples, with a graph where gradients are on."""

    def track(self, axis: RankAxis, name: str, tensor: Tensor, where: Where = 0) -> Tensor:
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
        refuses: axes -> why it is not for them, as a sentence without its end; empty where it is. Asked at the start of a run.
    """

    score: Callable[[Axes, Run], Scores]
    observe: Callable[[Axes, Run], None] | None = None
    examples: int = 0
    refuses: Callable[[Axes], str] = lambda axes: ""


def magnitude(axis: RankAxis) -> Tensor:
    """Product over the factors of the unit's Frobenius norm: (units,). The norm of the unit, where it is a rank-one term."""
    norms = axis.per_unit(
        lambda slot: slot.tensor.detach() if slot.tensor.is_floating_point() else None, "norm"
    )
    return torch.stack(list(norms.values())).prod(0)


def gate(axis: RankAxis) -> Tensor:
    """|dL/dg| of a virtual gate g = 1 on each unit, from the gradients of this step: (units,).

    Zero where the layer took no part in the forward, as BERT's pooler takes none in a masked language model.
    """
    closing = axis.closing()
    if all(slot.tensor.grad is None for slot in closing):
        return closing[0].tensor.new_zeros(len(axis))
    return axis.gate_grad().abs()


def triplet(
    axis: RankAxis, per_element: Callable[[Slot], Tensor | None], gate_value: Tensor
) -> Tensor:
    """AdaLoRA's sum (arXiv:2303.10512): the gate's importance plus the mean over each factor's slice.

    Where the closing factor is one number a unit (the SVD form) it is the gate, and is not counted twice.
    """

    def factors(slot: Slot) -> Tensor | None:
        return None if slot.closes and slot.tensor.dim() == 1 else per_element(slot)

    means = axis.per_unit(factors, "mean").values()
    return gate_value + sum(means, torch.zeros_like(gate_value))


@dataclass(frozen=True)
class Elements:
    """A trained tensor of some axes, once however many they are.

    Args:
        axis: the first that has it, which owns its running averages.
        label: of the tensor in that axis.
        tensor: as it is now.
        where: (key of an axis, dimension that counts its units), for all axes that have it.
    """

    axis: RankAxis
    label: str
    tensor: Tensor
    where: tuple[tuple[str, int], ...]


def elements(axes: Axes) -> list[Elements]:
    """Each tensor of the axes that trains, once: two axes may share one, and a square one has its axis twice."""
    found: dict[int, Elements] = {}
    for key, axis in axes.items():
        for slot in axis.slots():
            if slot.tensor.requires_grad:
                known = found.get(id(slot.tensor))
                here = (key, slot.dim)
                if known is None:
                    found[id(slot.tensor)] = Elements(axis, slot.label, slot.tensor, (here,))
                else:
                    found[id(slot.tensor)] = replace(known, where=(*known.where, here))
    return list(found.values())


def _is_gate(element: Elements) -> bool:
    """One number a unit, that closes it: a gate already."""
    return element.tensor.dim() == 1 and any(
        s.closes for s in element.axis.slots() if s.tensor is element.tensor
    )


def zeros(like: Tensor, *shape: int) -> Tensor:
    """What an average starts from: zeros that take no memory until they are needed."""
    return like.new_zeros(()).expand(shape or like.shape)


def update_averages(averages: list[Tensor], values: list[Tensor], beta: float) -> None:
    """average <- beta average + (1 - beta) value, in place, for all at once; no bias correction, as in the released codes."""
    if averages:
        torch._foreach_lerp_(averages, values, 1 - beta)


def _products(axes: Axes, closing_only: bool) -> tuple[list[Elements], list[Tensor]]:
    """Tensors with a gradient, and theta * gradient of each, in one batch of kernels."""
    with_grad = [e for e in elements(axes) if e.tensor.grad is not None]
    if closing_only:
        closing = {id(slot.tensor) for axis in axes.values() for slot in axis.closing()}
        with_grad = [e for e in with_grad if id(e.tensor) in closing]
    if not with_grad:
        return [], []
    tensors, grads = (
        [e.tensor.detach() for e in with_grad],
        [cast(Tensor, e.tensor.grad) for e in with_grad],
    )
    return with_grad, list(torch._foreach_mul(tensors, grads))


def _gates(axes: Axes, products: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """|dL/dg| of each axis, from the products of its closing factors; zero where it took no part in the forward."""
    gates = {}
    for key, axis in axes.items():
        closing = axis.closing()
        total = closing[0].tensor.new_zeros(len(axis))
        for slot in closing:
            product = products.get(id(slot.tensor))
            if product is not None:
                total = total + (
                    product
                    if product.dim() == 1
                    else product.movedim(slot.dim, 0).flatten(1).sum(1)
                )
        gates[key] = total.abs()
    return gates


def _observe_gates(axes: Axes, run: Run) -> None:
    found, products = _products(axes, closing_only=True)
    values = _gates(
        axes, {id(e.tensor): product for e, product in zip(found, products, strict=True)}
    )
    update_averages(
        [run.track(axes[k], "gate", zeros(v)) for k, v in values.items()],
        list(values.values()),
        run.beta,
    )


def _gate_average(axis: RankAxis, track: Track) -> Tensor:
    return track("gate", zeros(axis.closing()[0].tensor, len(axis)))


def _observe_elements(axes: Axes, run: Run) -> None:
    """I <- EMA of |w g|, U <- EMA of ||w g| - I|, with I already updated; for every element, and for the gate of each unit."""
    found, products = _products(axes, closing_only=False)
    gates = _gates(
        axes, {id(e.tensor): product for e, product in zip(found, products, strict=True)}
    )
    values = [*gates.values()]
    streams: list[tuple[RankAxis, str, tuple[tuple[str, int], ...]]] = [
        (axes[k], "gate", ((k, 0),)) for k in gates
    ]
    kept = [(e, product) for e, product in zip(found, products, strict=True) if not _is_gate(e)]
    if kept:
        torch._foreach_abs_([product for _, product in kept])
    values += [product for _, product in kept]
    streams += [(e.axis, e.label, e.where) for e, _ in kept]
    if not values:
        return
    I = [
        run.track(axis, f"I.{name}", zeros(v), where)
        for (axis, name, where), v in zip(streams, values, strict=True)
    ]
    U = [
        run.track(axis, f"U.{name}", zeros(v), where)
        for (axis, name, where), v in zip(streams, values, strict=True)
    ]
    update_averages(I, values, run.beta)
    off = torch._foreach_sub(values, I)
    torch._foreach_abs_(off)
    update_averages(U, list(off), run.beta)


def _elementwise(uncertainty: bool) -> Callable[[Axes, Run], Scores]:
    def scores(axes: Axes, run: Run) -> Scores:
        def importance(
            axis: RankAxis, name: str, like: Tensor, where: tuple[tuple[str, int], ...]
        ) -> Tensor:
            average = run.track(axis, f"I.{name}", zeros(like), where)
            return (
                average * run.track(axis, f"U.{name}", zeros(like), where)
                if uncertainty
                else average
            )

        found = elements(axes)
        every = {
            id(e.tensor): importance(e.axis, e.label, e.tensor.detach(), e.where)
            for e in found
            if not _is_gate(e)
        }
        result = {}
        for key, axis in axes.items():
            units = importance(
                axis, "gate", zeros(axis.closing()[0].tensor.detach(), len(axis)), ((key, 0),)
            )
            result[key] = triplet(axis, lambda slot: every.get(id(slot.tensor)), units)
        return result

    return scores


def each(score: Callable[[RankAxis, Track], Tensor]) -> Callable[[Axes, Run], Scores]:
    """A score of one axis, for all of them."""

    def scores(axes: Axes, run: Run) -> Scores:
        return {key: score(axis, partial(run.track, axis)) for key, axis in axes.items()}

    return scores


def _random(axes: Axes, run: Run) -> Scores:
    return {
        key: torch.rand(len(axis), generator=generator(run.seed, key, run.steps_done))
        for key, axis in axes.items()
    }


IMPORTANCES: dict[str, Importance] = {
    "magnitude": Importance(each(lambda axis, track: magnitude(axis))),
    "gate": Importance(each(_gate_average), _observe_gates),
    "sensitivity": Importance(_elementwise(uncertainty=False), _observe_elements),
    "sensitivity_uncertainty": Importance(_elementwise(uncertainty=True), _observe_elements),
    "random": Importance(_random),
    "uniform": Importance(each(lambda axis, track: torch.ones(len(axis)))),
}
"""Scores by name; files that make further ones add them. "gate" keeps 1 float a unit, the sensitivities 2 floats a trainable number;
"random" and "uniform" know nothing, and are what others are held against. Any name with "_per_cost" appended is that score over the
unit's trainable numbers."""


def importance(name: str) -> Importance:
    """A score by its name.

    Raises:
        ValueError: for an unknown one; the nearest is named.
    """
    plain = name.removesuffix("_per_cost")
    if plain not in IMPORTANCES:
        close = difflib.get_close_matches(plain, IMPORTANCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"importance={name!r} is no score.{hint} There are {', '.join(IMPORTANCES)}, each also with _per_cost appended."
        )
    found = IMPORTANCES[plain]
    return found if plain == name else per_cost(found)


def per_cost(score: Importance) -> Importance:
    """The score over what the unit costs: its trainable numbers, in all tensors of its axis."""

    def scores(axes: Axes, run: Run) -> Scores:
        return {
            key: values / unit_cost(axes[key]) for key, values in score.score(axes, run).items()
        }

    return replace(score, score=scores)


def unit_cost(axis: RankAxis) -> int:
    """Trainable numbers of one unit, at the sizes that other axes have now."""
    return sum(
        slot.tensor.numel() // len(axis) for slot in axis.slots() if slot.tensor.requires_grad
    )
