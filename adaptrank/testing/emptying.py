"""Clauses about axes without units: what the layer computes then, and how it grows again."""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from adaptrank.axes import RankAxis, fit_ranks, generator, rank_axes
from adaptrank.parameterizations import Capability, Parameterization
from adaptrank.testing.assertions import assert_close, describe, run_backward
from adaptrank.testing.bases import Build, Sample, normal_input, output, perturb


def check_emptying(build: Build, sample: Sample = normal_input) -> None:
    """Check that an axis without any unit is what closing all of its units leaves.

    The layer must still merge, store and copy itself. It must grow again without a change of its
    output, and every tensor must learn then, whatever the order in which empty axes grow.
    """
    for key in rank_axes(build()):
        layer = build()
        perturb(layer)
        x, axis = sample(layer, (5,)), rank_axes(layer)[key]
        with axis.closed(range(len(axis))):
            closed = output(layer, x).detach()
        axis.resize([])
        assert len(axis) == 0, f"{key}: has {len(axis)} units after keeping none."
        sentence = f"{key}: an axis without units is not what closing them leaves."
        assert_close(output(layer, x), closed, sentence)
        assert_close(layer.definition(x), closed, f"{key}: without units {sentence}")
        if layer.idle:
            assert torch.equal(output(layer, x), output(layer.base, x)), (
                f"{key}: an idle layer does not compute what its base does."
            )
        layer.cost()
        _check_storage(build, layer, sample)
        if Capability.GROW in axis.capabilities:
            axis.resize(grow=1, generator=generator(0, key, 1))
            assert_close(output(layer, x), closed, f"{key}: growing changed the output.", 1e-12)
            perturb(layer)
            _check_learning(key, layer, [axis], sample)
    _check_all_axes(build, sample)


def _check_storage(build: Build, layer: Parameterization, sample: Sample) -> None:
    """Check that a state dict and a copy of a layer with an empty axis compute the same."""
    x = sample(layer, (5,))
    other = build()
    perturb(other, seed=2)
    state = layer.state_dict()
    fit_ranks(other, state)
    other.load_state_dict(state, strict=True)
    for how, twin in (("state dict", other), ("copy", copy.deepcopy(layer))):
        same = torch.equal(output(twin, x), output(layer, x)) and twin.idle == layer.idle
        assert same, f"{describe(layer)}: its {how} forgets that an axis has no units."


def _check_all_axes(build: Build, sample: Sample) -> None:
    """Check that a layer learns after all of its axes were empty, in two orders of growth."""
    keys = list(rank_axes(build()))
    for order in (keys, keys[::-1]):
        layer = build()
        axes = rank_axes(layer)
        if not axes or any(Capability.GROW not in axis.capabilities for axis in axes.values()):
            return
        perturb(layer)
        x = sample(layer, (5,))
        for axis in axes.values():
            axis.resize([])
        without = output(layer, x).detach()
        for key in order:
            axes[key].resize(grow=1, generator=generator(0, key, 1))
            assert_close(output(layer, x), without, f"{key}: growing changed the output.", 1e-12)
        _check_learning(", ".join(order), layer, axes.values(), sample)


def _check_learning(key: str, layer: nn.Module, axes: Iterable[RankAxis], sample: Sample) -> None:
    """Check that every trained tensor of some axes moves within a few steps of descent."""
    tensors = {
        slot.label: slot.tensor
        for axis in axes
        for slot in axis.slots()
        if slot.tensor.requires_grad
    }
    previous = {label: tensor.detach().clone() for label, tensor in tensors.items()}
    optimizer = torch.optim.Adam(tensors.values(), lr=0.01)
    assert isinstance(layer, Parameterization)
    x = sample(layer, (5,))
    for _ in range(len(layer.axes) + 3):
        optimizer.zero_grad()
        run_backward(output(layer, x))
        optimizer.step()
    still = [name for name, tensor in tensors.items() if torch.equal(tensor, previous[name])]
    assert not still, f"{key}: {still[0]} of units that grew from none never learns."
