"""Tests of MultiScale beside the common contract."""

import copy

import pytest
import torch
from test_hyperadapt import meta
from test_lora import total
from torch import nn

from adaptrank import testing
from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import MultiScale
from adaptrank.testing import builder, perturb

DEBERTA_BASE = {**dict.fromkeys("qkvo", (768, 768)), "up": (3072, 768), "down": (768, 3072)}


def test_closed_count():
    testing.check_parameter_count(
        builder(MultiScale, nn.Linear(48, 24)), lambda m, n: 8 * (m + n) + 2 * 8 * 8 + 8
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 4, "width": 8},
        {"rank": 12, "width": 5},
        {"rank": 3, "width": 1},
        {"rank": 5, "width": 24, "init": "released", "orth": 0},
    ],
)
def test_variants(arguments):
    base = testing.example_bases(MultiScale)[0]
    build = builder(MultiScale, base, **arguments)
    q, k = arguments["rank"], arguments["width"]
    testing.check_contract(build, count=lambda m, n: k * (m + n) + 2 * k * q + q)
    testing.check_cost(builder(MultiScale, copy.deepcopy(base).float(), **arguments))
    testing.check_low_precision(
        builder(MultiScale, copy.deepcopy(base).to(torch.bfloat16), **arguments)
    )
    testing.check_conv1d_twin(MultiScale, arguments=arguments)


@pytest.mark.parametrize(("width", "bulk"), [(8, 1_327_104), (1, 165_888)])
@pytest.mark.parametrize("rank", [4, 8])
def test_printed_counts(width, bulk, rank):
    model = adapt(
        meta(DEBERTA_BASE, 12), "all-linear", lambda base: MultiScale(base, rank=rank, width=width)
    )
    assert total(model) == bulk + 72 * (2 * width * rank + rank)


def test_what_a_unit_of_each_axis_costs():
    layer = MultiScale(nn.Linear(48, 24), rank=4, width=8)
    cost, sizes = cost_model(layer), {key: len(axis) for key, axis in rank_axes(layer).items()}
    assert sizes == {":core": 4, ":input": 8, ":output": 8}
    assert [cost.marginal(f":{axis}", sizes) for axis in ("core", "input", "output")] == [
        17,
        48 + 4,
        24 + 4,
    ]


@pytest.mark.parametrize(("rank", "width"), [(4, 8), (8, 8), (8, 3)])
def test_the_rank_of_the_change(rank, width):
    layer = MultiScale(nn.Linear(48, 24).double(), rank=rank, width=width)
    perturb(layer)
    assert torch.linalg.matrix_rank(layer.weight - layer.base.weight) == min(rank, width)


def test_axes_move_independently():
    layer = MultiScale(nn.Linear(48, 24).double(), rank=6, width=5)
    perturb(layer)
    axes, x = rank_axes(layer), torch.randn(3, 48).double()
    before = layer(x)
    axes[":input"].resize(grow=2, generator=generator(0, ":input", 1))
    axes[":core"].resize(grow=3, generator=generator(0, ":core", 1))
    axes[":output"].resize(grow=1, generator=generator(0, ":output", 1))
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    assert [t.shape for t in (layer.A, layer.B1, layer.e, layer.B2a, layer.B2b)] == [
        (7, 48),
        (9, 7),
        (9,),
        (6, 9),
        (24, 6),
    ]
    axes[":output"].resize([0, 2])
    torch.testing.assert_close(layer(x), layer.definition(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rank", "width"), [(4, 8), (8, 8), (12, 8)])
def test_the_penalty_is_zero_at_the_start_with_a_finite_gradient_and_positive_elsewhere(
    rank, width
):
    layer = MultiScale(nn.Linear(48, 24).double(), rank=rank, width=width)
    penalty = layer.penalty()
    penalty.backward()
    assert penalty < 1e-24
    factors = [layer.A, layer.B1, layer.B2a, layer.B2b]
    assert all(f.grad.isfinite().all() for f in factors)
    assert layer.e.grad is None
    perturb(layer)
    off = [min((f @ f.T, f.T @ f), key=len) for f in factors]
    want = 0.1 * sum((g - torch.eye(len(g)).double()).norm() ** 2 for g in off) / 4
    torch.testing.assert_close(layer.penalty(), want, rtol=1e-12, atol=1e-12)
    assert MultiScale(nn.Linear(48, 24), orth=0).penalty() is None


def test_closed_units_stay_closed_to_the_output_and_can_return():
    layer = MultiScale(nn.Linear(48, 24).double())
    perturb(layer)
    rank_axes(layer)[":core"].close([2, 5])
    assert torch.equal(layer.e == 0, torch.tensor([i in (2, 5) for i in range(8)]))
    layer(torch.randn(4, 48).double()).square().sum().backward()
    assert layer.e.grad[[2, 5]].all()


def test_inits_and_scale():
    layer = MultiScale(nn.Linear(400, 240), rank=8, width=8, alpha=32)
    assert layer.scale == 4
    torch.testing.assert_close(layer.A @ layer.A.T, torch.eye(8), rtol=0, atol=1e-5)
    assert not layer.e.any()
    released = MultiScale(nn.Linear(400, 240), init="released").A
    torch.testing.assert_close(released.std().item(), 0.02, rtol=0.1, atol=0)


def test_dropout_is_on_the_way_to_a_only():
    layer = MultiScale(nn.Linear(48, 24), dropout=0.5)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    perturb(layer)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rank": 0}, "use rank >= 1"),
        ({"width": 25}, "width=25 does not fit a 24x48 layer; use 1 to 24"),
        ({"width": 0}, "use 1 to 24"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MultiScale(nn.Linear(48, 24), **arguments)
