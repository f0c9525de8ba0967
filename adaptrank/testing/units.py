"""Clauses about the units of a method: their number, their price, pruning, growth and gates."""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from adaptrank import layers
from adaptrank.axes import RankAxis, Slot, cost_model, generator, rank_axes
from adaptrank.parameterizations import Capability
from adaptrank.testing.assertions import assert_close, describe, explaining, run_backward
from adaptrank.testing.bases import (
    Build,
    Sample,
    first_tensor,
    normal_input,
    output,
    perturb,
    trainable,
)


def check_parameter_count(build: Build, count: Callable[..., int] | None = None) -> None:
    """Check that the cost model counts what an optimizer would see.

    A unit must cost what it adds, and both must agree with the method's formula.
    """
    layer = build()
    numbers = sum(parameter.numel() for parameter in trainable(layer).values())
    if count is not None:
        want = count(*(layer.shape if isinstance(layer.innermost, layers.MATRICES) else ()))
        assert numbers == want, (
            f"{describe(layer)} trains {numbers} numbers; its formula says {want}."
        )
    for key in rank_axes(layer):
        layer = build()
        axis, cost = rank_axes(layer)[key], cost_model(layer)
        sizes = {k: len(a) for k, a in rank_axes(layer).items()}
        assert cost.total(sizes) == numbers, (
            f"{key}: the cost model says {cost.total(sizes)}, the tensors {numbers}."
        )
        if not room(axis, 1):
            continue
        axis.resize(grow=1, generator=generator(0, key, 0))
        added = sum(parameter.numel() for parameter in trainable(layer).values()) - numbers
        marginal = cost.marginal(key, sizes)
        assert added == marginal, (
            f"{key}: a unit adds {added} numbers; the cost model says {marginal}."
        )
    if not rank_axes(layer):
        assert cost_model(layer).total({}) == numbers, (
            f"{describe(layer)}: the cost model misses fixed tensors."
        )


def check_pruning(build: Build, sample: Sample = normal_input) -> None:
    """Check that removing a unit is what closing it leaves, and that survivors keep every bit."""
    for key, axis in rank_axes(build()).items():
        for unit in sorted({0, len(axis) // 2, len(axis) - 1}):
            _check_removal(build, sample, key, unit)


def _check_removal(build: Build, sample: Sample, key: str, unit: int) -> None:
    layer = build()
    perturb(layer)
    x, axis = sample(layer, (5,)), rank_axes(layer)[key]
    full = output(layer, x)
    with axis.closed([unit]):
        closed = output(layer, x)
    assert torch.equal(output(layer, x), full), f"{key}: closed() did not give every bit back."
    assert not torch.allclose(closed, full), f"{key}: closing unit {unit} changes nothing."
    keep = [other for other in range(len(axis)) if other != unit]
    survivors = {slot.label: _selected(axis, slot, keep) for slot in axis.slots()}
    axis.resize(keep)
    assert len(axis) == len(keep), f"{key}: has {len(axis)} units after keeping {len(keep)}."
    sentence = f"{key}: removing unit {unit} is not what closing it leaves."
    assert_close(output(layer, x), closed, sentence)
    for slot in axis.slots():
        same = torch.equal(slot.tensor, survivors[slot.label])
        assert same, f"{key}: survivors of {slot.label} changed."


def check_growth(build: Build, sample: Sample = normal_input) -> None:
    """Check that fresh units leave the output as it is, to 1e-12, and can learn.

    Units that were there keep every bit.
    """
    for key in rank_axes(build()):
        layer = build()
        perturb(layer)
        axis, x = rank_axes(layer)[key], sample(layer, (5,))
        if Capability.GROW not in axis.capabilities or not (n := _make_room(axis, 2)):
            continue
        size, previous_output = len(axis), output(layer, x).detach()
        previous = {slot.label: slot.tensor.detach().clone() for slot in axis.slots()}
        axis.resize(grow=n, generator=generator(0, key, 1))
        sentence = f"{key}: growing changed the output."
        assert_close(output(layer, x), previous_output, sentence, 1e-12)
        for slot in axis.slots():
            kept = _selected(axis, slot, list(range(size)))
            same = torch.equal(kept, previous[slot.label])
            assert same, f"{key}: old units of {slot.label} changed."
            _check_fresh(key, slot, range(size, size + n))
        run_backward(output(layer, x))
        _check_fresh_gradients(key, axis, size)


def _check_fresh(key: str, slot: Slot, units: range) -> None:
    """Check that the closing factor of fresh units is zero, and that the others are not."""
    fresh = slot.select(units)
    if slot.closes:
        assert not fresh.any(), f"{key}: {slot.label} of a fresh unit is not zero."
        return
    largest = fresh.double().movedim(slot.dim, 0).reshape(len(units), -1).abs().amax(1)
    assert not slot.tensor.is_floating_point() or largest.all(), (
        f"{key}: {slot.label} of a fresh unit is zero; with two zero factors it is dead."
    )


def _check_fresh_gradients(key: str, axis: RankAxis, size: int) -> None:
    """Check that a gradient reaches the closing factor of every unit from `size` on."""
    largest = []
    for slot in axis.closing():
        if slot.tensor.grad is not None:
            grads = slot.tensor.grad.movedim(slot.dim, 0).reshape(len(axis), -1)
            largest.append(grads[size:].abs().amax(1))
    learns = bool(largest) and bool(torch.stack(largest).amax(0).all())
    assert learns, f"{key}: no gradient reaches the closing factor of a fresh unit."


def check_limits(build: Build) -> None:
    """Check that an axis refuses units that it has not, and to grow past its ceiling.

    It must stay as it was.
    """
    for key in rank_axes(build()):
        axis = rank_axes(build())[key]
        size, largest = len(axis), axis.limits()[1]
        refused: list[tuple[list[int], int]] = [([size], 0), ([], -1)]
        if largest is not None:
            assert size <= largest, (
                f"{key} starts with {size} units, above its own ceiling of {largest}."
            )
            refused.append((list(range(size)), largest - size + 1))
        for keep, grow in refused:
            try:
                axis.resize(keep, grow, generator(0, key, 0))
            except ValueError:
                assert len(axis) == size, f"{key} was resized by a call it refused."
            else:
                raise AssertionError(
                    f"{key} of {size} units let itself be resized to keep {keep} and grow {grow}."
                )


def check_gate_gradient(build: Build, sample: Sample = normal_input) -> None:
    """Check that <theta, grad> of the closing factor is the gradient of a gate on each unit."""
    for key in rank_axes(build()):
        layer = build()
        perturb(layer)
        axis, x = rank_axes(layer)[key], sample(layer, (5,))
        gate = torch.ones(len(axis), dtype=torch.float64, requires_grad=True)
        names = {
            id(tensor): name for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
        }
        gated = {}
        for slot in axis.closing():
            shape = [1] * slot.tensor.dim()
            shape[slot.dim] = -1
            gated[names[id(slot.tensor)]] = slot.tensor.detach() * gate.view(shape)
        run_backward(first_tensor(torch.func.functional_call(layer, gated, (x,))))
        run_backward(output(layer, x))
        assert_close(
            axis.gate_grad(),
            cast(Tensor, gate.grad),
            f"{key}: gate_grad() is not the gradient of a gate.",
        )


def check_gates(build: Build, sample: Sample = normal_input) -> None:
    """Check that a gate on an axis reaches the forward pass and the weight.

    It has to act like the same gate multiplied into the closing factor.
    """
    for key in rank_axes(build()):
        layer = build()
        perturb(layer)
        axis, x = rank_axes(layer)[key], sample(layer, (5,))
        gate = (torch.arange(len(axis)) % 2).double()
        folded = copy.deepcopy(layer)
        axis_of_folded = rank_axes(folded)[key]
        axis_of_folded.gate = gate
        axis_of_folded.fold()
        with torch.no_grad():
            expected = output(folded, x)
            dense = folded.dense() if layer.mergeable else None
        with axis.gated(gate), torch.no_grad(), explaining(f"{key}: a gate is not read."):
            assert_close(output(layer, x), expected, "The forward pass ignores it.")
            if dense is not None:
                assert_close(layer.dense(), dense, "The weight ignores it.")


def _selected(axis: RankAxis, slot: Slot, units: list[int]) -> Tensor:
    """Return the tensor of a slot with these units only, in every dimension of the axis."""
    value = slot.tensor.detach()
    for other in axis.slots():
        if other.tensor is slot.tensor:
            value = value.index_select(other.dim, torch.tensor(units, dtype=torch.long))
    return value


def room(axis: RankAxis, wanted: int) -> int:
    """Return the number of units, up to `wanted`, that the axis can grow by."""
    largest = axis.limits()[1]
    return wanted if largest is None else min(wanted, largest - len(axis))


def _make_room(axis: RankAxis, wanted: int) -> int:
    """Prune an axis at its ceiling, and return the number of units that it can grow by."""
    if not room(axis, wanted) and len(axis) > 1:
        axis.resize(range(max(1, len(axis) - wanted)))
    return room(axis, wanted)
