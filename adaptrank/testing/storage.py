"""Clauses about what is written: merged weights, factors, state dicts, copies and arguments."""

import copy
import json
import pickle

import torch

from adaptrank import layers
from adaptrank.axes import fit_ranks, generator, rank_axes
from adaptrank.parameterizations import Capability, Parameterization, is_index
from adaptrank.testing.assertions import assert_close, describe, explaining
from adaptrank.testing.bases import Build, Sample, merges, normal_input, output, perturb
from adaptrank.testing.units import room


def check_merged(build: Build, sample: Sample = normal_input) -> None:
    """Check that a plain layer with the merged parameters computes the same."""
    layer = build()
    if not merges(layer):
        return
    perturb(layer)
    plain = copy.deepcopy(layer.innermost)
    if isinstance(plain, layers.MATRICES):
        have = tuple(layer.weight.shape)
        assert have == layer.shape, f"{describe(layer)}.weight has shape {have}, not {layer.shape}."
    with torch.no_grad():
        layers.write(plain, layer.merged())
    x = sample(layer, (2, 3))
    assert_close(
        output(layer, x),
        output(plain, x),
        f"{describe(layer)}: the merged layer computes something else.",
    )


def check_factors(build: Build) -> None:
    """Check that U V of the factors is W' - W, if the method has factors."""
    layer = build()
    perturb(layer)
    if (factors := layer.low_rank()) is None:
        return
    U, V = factors
    (m, n), change = (
        layer.shape,
        (layer.dense() - layers.dense(layer.innermost, layer.adapter_dtype)).detach(),
    )
    assert (U.shape[0], *V.shape) == (m, U.shape[1], n), (
        f"{describe(layer)}.factors() is {tuple(U.shape)} times {tuple(V.shape)}, for {(m, n)}."
    )
    error = float((U @ V - change).norm())
    assert error <= 1e-9 * float(change.norm()) + 1e-12, (
        f"{describe(layer)}.factors() is not W' - W: off by {error:.1e}."
    )


def check_state_dict(build: Build, sample: Sample = normal_input) -> None:
    """Check that values and ranks come back from a state dict.

    They are loaded into a layer that was drawn otherwise.
    """
    layer, other = build(), build()
    perturb(layer, seed=1)
    perturb(other, seed=2)
    for number, (key, axis) in enumerate(rank_axes(layer).items()):
        grow = room(axis, 2) if number % 2 and Capability.GROW in axis.capabilities else 0
        first_kept = 0 if grow or len(axis) == 1 else 1
        axis.resize(range(first_kept, len(axis)), grow, generator(0, key, 2))
    perturb(layer, seed=3)
    x = sample(layer, (5,))
    # What the other layer caches in a forward pass must not survive the load.
    output(other, x)
    state = layer.state_dict()
    fit_ranks(other, state)
    with explaining(f"{describe(layer)} does not load its own state dict."):
        other.load_state_dict(state, strict=True)
    assert torch.equal(output(other, x), output(layer, x)), (
        f"{describe(layer)} computes something else after its state dict was loaded."
    )


def check_copies(build: Build, sample: Sample = normal_input) -> None:
    """Check that copies and pickles compute the same, know their arguments, and are independent."""
    layer = build()
    perturb(layer)
    x = sample(layer, (5,))
    want = output(layer, x).detach()
    for how, twin in (
        ("deepcopy", copy.deepcopy(layer)),
        ("pickle", pickle.loads(pickle.dumps(layer))),
    ):
        assert torch.equal(output(twin, x), want), (
            f"{describe(layer)}: its {how} computes something else."
        )
        assert twin.init_args == layer.init_args, (
            f"{describe(layer)}: its {how} forgot its arguments."
        )
        perturb(twin, seed=5)
        assert torch.equal(output(layer, x), want), (
            f"{describe(layer)}: its {how} shares tensors with it."
        )


def check_arguments(build: Build) -> None:
    """Check that `init_args` survives JSON and builds the same wrapper again."""
    layer = build()
    with explaining(f"{describe(layer)}: init_args is not plain data."):
        arguments = json.loads(json.dumps(layer.init_args))
    assert arguments == layer.init_args, (
        f"{describe(layer)}: init_args changes on its way through JSON."
    )
    again = type(layer)(copy.deepcopy(layer.base), **arguments)
    assert again.init_args == layer.init_args, (
        f"{describe(layer)}: built again, it has other arguments."
    )
    assert _tensor_shapes(again) == _tensor_shapes(layer), (
        f"{describe(layer)}: built again, it has other tensors."
    )


def check_indices(build: Build) -> None:
    """Check that the method states the range of every saved buffer of whole numbers.

    Its own numbers must lie in it, those of fresh units included. A state dict with another number
    is refused.
    """
    layer = build()
    for key, axis in rank_axes(layer).items():
        if Capability.GROW in axis.capabilities:
            axis.resize(grow=room(axis, 2), generator=generator(0, key, 3))
    present = {name for name, tensor in layer.own_tensors().items() if is_index(tensor)}
    ranges = layer.index_ranges()
    undeclared = sorted(present - ranges.keys())
    assert not undeclared, (
        f"{describe(layer)} saves the whole numbers {undeclared[0]}, and index_ranges() does not "
        f"state their range."
    )
    for name, allowed in ranges.items():
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        with explaining(f"{describe(layer)}: its own {name} is not in its range."):
            layer.load_state_dict(state)
        state[name].view(-1)[-1] = allowed.stop if allowed.stop < 1 << 62 else -1
        try:
            copy.deepcopy(layer).load_state_dict(state)
        except ValueError:
            continue
        raise AssertionError(f"{describe(layer)} loads a number outside of the range of {name}.")


def _tensor_shapes(layer: Parameterization) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in layer.state_dict().items()}
