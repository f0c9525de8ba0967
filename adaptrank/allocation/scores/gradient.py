"""Scores from weights and gradients. Higher is kept. All values are float32 or better."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from adaptrank.allocation.scores.elements import Elements, elements, update_averages, zeros
from adaptrank.allocation.scores.importance import (
    IMPORTANCES,
    Axes,
    Importance,
    Run,
    Scores,
    Track,
    each,
)
from adaptrank.axes import RankAxis, Slot, generator

# ---- scores of one axis


def magnitude(axis: RankAxis) -> Tensor:
    """Return the product over the factors of the Frobenius norm of the unit's slice, (units,).

    For a rank-1 component it is the norm of the unit. It is zero where another axis of the layer
    has no units, because the layer then adds nothing.
    """
    if axis.stopped:
        return axis.closing()[0].tensor.detach().new_zeros(len(axis))

    def floating(slot: Slot) -> Tensor | None:
        return slot.tensor.detach() if slot.tensor.is_floating_point() else None

    norms = axis.per_unit(floating, "norm")
    return torch.stack(list(norms.values())).prod(0)


def gate(axis: RankAxis) -> Tensor:
    """Return |dL/dg| of a virtual gate g = 1 on each unit, from present gradients, (units,).

    It is zero if the layer took no part in the forward pass. An example is BERT's pooler in a
    masked language model.
    """
    closing = axis.closing()
    if all(slot.tensor.grad is None for slot in closing):
        return closing[0].tensor.new_zeros(len(axis))
    return axis.gate_grad().abs()


def triplet(
    axis: RankAxis, per_element: Callable[[Slot], Tensor | None], gate_value: Tensor
) -> Tensor:
    """Return AdaLoRA's sum: the gate's importance plus the mean over each factor's slice, (units,).

    If the closing factor is one number for each unit (the SVD form), it is the gate and is not
    counted twice.

    Source: arXiv:2303.10512.
    """

    def factors(slot: Slot) -> Tensor | None:
        if slot.closes and slot.tensor.dim() == 1:
            return None
        return per_element(slot)

    means = axis.per_unit(factors, "mean").values()
    return gate_value + sum(means, torch.zeros_like(gate_value))


# ---- products of weights and gradients, for all axes in batched kernels


def _with_gradient(axes: Axes) -> list[Elements]:
    """Return the trainable tensors of the axes that have a gradient."""
    return [element for element in elements(axes) if element.tensor.grad is not None]


def _weights_times_gradients(with_grad: list[Elements]) -> dict[int, Tensor]:
    """Return {id of the tensor: theta * gradient} of tensors that have a gradient."""
    if not with_grad:
        return {}
    tensors = [element.tensor.detach() for element in with_grad]
    grads = [cast(Tensor, element.tensor.grad) for element in with_grad]
    products = torch._foreach_mul(tensors, grads)
    ids = [id(element.tensor) for element in with_grad]
    return dict(zip(ids, products, strict=True))


def _gate_gradients(axes: Axes, products: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return axis -> |dL/dg|, (units,), from the products of its closing factors.

    It is zero if the axis took no part in the forward pass.
    """
    gates = {}
    for key, axis in axes.items():
        closing = axis.closing()
        total = closing[0].tensor.new_zeros(len(axis))
        for slot in closing:
            product = products.get(id(slot.tensor))
            if product is None:
                continue
            if product.dim() > 1:
                product = product.movedim(slot.dim, 0).flatten(1).sum(1)
            total = total + product
        gates[key] = total.abs()
    return gates


# ---- "gate": a running average of |dL/dg|, one float for each unit


def _observe_gates(axes: Axes, run: Run) -> None:
    closing: set[int] = set()
    for axis in axes.values():
        closing.update(id(slot.tensor) for slot in axis.closing())
    closing_only = [element for element in _with_gradient(axes) if id(element.tensor) in closing]
    values = _gate_gradients(axes, _weights_times_gradients(closing_only))
    averages = [run.track(axes[key], "gate", zeros(value)) for key, value in values.items()]
    update_averages(averages, list(values.values()), run.beta)


def _gate_average(axis: RankAxis, track: Track) -> Tensor:
    average = track("gate", zeros(axis.closing()[0].tensor, len(axis)))
    return torch.zeros_like(average) if axis.stopped else average


# ---- "sensitivity": running averages of |w g|, two floats for each trainable number


@dataclass(frozen=True)
class _Stream:
    """Values that are averaged over the steps: those of a tensor, or of the gates of an axis.

    Args:
        axis: owner of the running averages.
        name: name of the stream in its axis.
        values: values of this step, or a tensor of the same shape and dtype.
        where: (axis key, dimension that counts its units).
    """

    axis: RankAxis
    name: str
    values: Tensor
    where: tuple[tuple[str, int], ...]

    def track(self, run: Run, average: str) -> Tensor:
        """Return a running average of the stream, "I" or "U"."""
        return run.track(self.axis, f"{average}.{self.name}", zeros(self.values), self.where)


def _observe_elements(axes: Axes, run: Run) -> None:
    """Update I <- EMA of |w g| and U <- EMA of ||w g| - I|, where I is already updated.

    Both are kept for every trainable number, and for the gate of each unit.
    """
    with_grad = _with_gradient(axes)
    products = _weights_times_gradients(with_grad)
    gates = _gate_gradients(axes, products)
    streams = [_Stream(axes[key], "gate", values, ((key, 0),)) for key, values in gates.items()]

    factors = [element for element in with_grad if not element.is_gate]
    sensitivities = [products[id(element.tensor)] for element in factors]
    if sensitivities:
        torch._foreach_abs_(sensitivities)
    for element, values in zip(factors, sensitivities, strict=True):
        streams.append(_Stream(element.axis, element.label, values, element.where))
    if not streams:
        return

    values_now = [stream.values for stream in streams]
    I = [stream.track(run, "I") for stream in streams]
    U = [stream.track(run, "U") for stream in streams]
    update_averages(I, values_now, run.beta)
    deviations = torch._foreach_sub(values_now, I)
    torch._foreach_abs_(deviations)
    update_averages(U, list(deviations), run.beta)


def _sensitivity(axes: Axes, run: Run, uncertainty: bool) -> Scores:
    """Return AdaLoRA's sum of I, or of I * U with `uncertainty`, for all axes.

    Where another axis of the layer has no units, there are no gradients, and the averages stand
    still. The units score zero then: they change nothing.
    """

    def average(stream: _Stream) -> Tensor:
        smoothed = stream.track(run, "I")
        if uncertainty:
            return smoothed * stream.track(run, "U")
        return smoothed

    of_tensor: dict[int, Tensor] = {}
    for element in elements(axes):
        if not element.is_gate:
            tensor = element.tensor.detach()
            stream = _Stream(element.axis, element.label, tensor, element.where)
            of_tensor[id(element.tensor)] = average(stream)

    result = {}
    for key, axis in axes.items():
        gates = zeros(axis.closing()[0].tensor.detach(), len(axis))
        gate_value = average(_Stream(axis, "gate", gates, ((key, 0),)))
        score = triplet(axis, lambda slot: of_tensor.get(id(slot.tensor)), gate_value)
        result[key] = torch.zeros_like(score) if axis.stopped else score
    return result


# ---- scores that know nothing, to compare others with


def _random(axes: Axes, run: Run) -> Scores:
    scores = {}
    for key, axis in axes.items():
        scores[key] = torch.rand(len(axis), generator=generator(run.seed, key, run.steps_done))
    return scores


def _uniform(axis: RankAxis, track: Track) -> Tensor:
    return torch.ones(len(axis))


IMPORTANCES["magnitude"] = Importance(each(lambda axis, track: magnitude(axis)))
IMPORTANCES["gate"] = Importance(each(_gate_average), _observe_gates)
IMPORTANCES["sensitivity"] = Importance(partial(_sensitivity, uncertainty=False), _observe_elements)
IMPORTANCES["sensitivity_uncertainty"] = Importance(
    partial(_sensitivity, uncertainty=True), _observe_elements
)
IMPORTANCES["random"] = Importance(_random)
IMPORTANCES["uniform"] = Importance(each(_uniform))
