"""Tests of NEAT beside the common contract."""

import copy

import pytest
import torch
from test_hyperadapt import meta
from test_lora import total
from torch import nn

from adaptrank import testing
from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import NEAT, SVD, HyperAdapt, LoRA
from adaptrank.testing import builder, perturb


def test_closed_count():
    testing.check_parameter_count(builder(NEAT, nn.Linear(48, 24)), lambda m, n: 2 * 8 * m)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_variants(depth, side, activation):
    bases = testing.example_bases(NEAT)
    for base in bases if (depth, activation) == (1, "relu") else bases[:1]:
        build = builder(
            NEAT, base, rank=4, depth=depth, side=side, activation=activation, scale=0.5
        )
        d = build().shape[side == "input"]
        testing.check_contract(build, count=lambda m, n, d=d: 2 * 4 * d + 2 * depth * 16)
        low = builder(NEAT, copy.deepcopy(base).to(torch.bfloat16), rank=4, depth=depth, side=side)
        testing.check_low_precision(low)
    single = builder(NEAT, nn.Linear(48, 24), rank=4, depth=depth, side=side, activation=activation)
    testing.check_cost(single)
    testing.check_conv1d_twin(
        NEAT, arguments={"rank": 4, "depth": depth, "side": side, "activation": activation}
    )


@pytest.mark.parametrize(("rank", "count"), [(32, 7_340_032), (1, 229_376)])
def test_printed_counts(rank, count):
    llama = meta({"q": (3072, 3072), "v": (1024, 3072)}, 28)
    assert total(adapt(llama, "all-linear", lambda base: NEAT(base, rank=rank))) == count


def test_a_unit_of_a_deep_network_costs_its_rows_and_columns():
    layer = NEAT(nn.Linear(48, 24), rank=4, depth=2)
    assert cost_model(layer).marginal(":rank", {":rank": 4}) == 2 * 24 + 2 * 2 * (2 * 4 + 1)


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_formula_of_depth_two_written_out(side):
    layer = NEAT(
        nn.Linear(48, 24).double(), rank=5, depth=2, side=side, activation="silu", scale=0.3
    )
    perturb(layer)
    f, W = nn.functional.silu, layer.base.weight
    first = f(layer.A @ W) if side == "output" else f(layer.A @ W.T)
    second = f(layer.E_0 @ first)
    H = f(layer.D_0 @ f(layer.E_1 @ second)) + second
    change = 0.3 * layer.B @ (f(layer.D_1 @ H) + first)
    want = W + (change if side == "output" else change.T)
    torch.testing.assert_close(layer.weight, want, rtol=1e-12, atol=1e-12)


def test_the_rank_of_the_change_is_at_most_the_number_of_units():
    layer = NEAT(nn.Linear(48, 24).double(), rank=5, depth=1)
    perturb(layer)
    assert torch.linalg.matrix_rank(layer.weight - layer.base.weight) == 5


def test_a_fresh_unit_reads_from_the_others_and_does_not_feed_them():
    layer = NEAT(nn.Linear(48, 24).double(), rank=3, depth=1)
    perturb(layer)
    rank_axes(layer)[":rank"].resize(grow=2, generator=generator(0, ":rank", 1))
    assert layer.E_0.shape == (5, 5)
    assert not layer.E_0[:, 3:].any()
    assert layer.E_0[3:, :3].all()
    layer(torch.randn(4, 48).double()).square().sum().backward()
    assert layer.E_0.grad[:, 3:].any()


def test_a_unit_that_a_relu_keeps_off_is_free_to_remove():
    base = nn.Linear(48, 24).double()
    with torch.no_grad():
        base.weight.abs_()
    layer = NEAT(base, rank=4)
    perturb(layer)
    with torch.no_grad():
        layer.A[2].abs_().neg_()
    x = torch.randn(5, 48).double()
    before = layer(x)
    before.square().sum().backward()
    assert not layer.A.grad[2].any()
    assert not layer.B.grad[:, 2].any()
    rank_axes(layer)[":rank"].resize([0, 1, 3])
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)


def test_no_dense_copy_of_a_half_precision_weight_is_kept():
    layer = NEAT(nn.Linear(480, 240).to(torch.bfloat16))
    x, kept = torch.randn(3, 480).to(torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert max(t.numel() for t in kept if t.dtype == torch.float32) <= 8 * 480


@pytest.mark.parametrize("inner", [LoRA, HyperAdapt, SVD])
def test_what_it_reads_is_the_weight_of_what_it_wraps_and_trains_it(inner):
    layer = NEAT(inner(nn.Linear(48, 24).double()), activation="gelu")
    perturb(layer)
    first = layer.base
    want = first.weight + layer.B @ nn.functional.gelu(layer.A @ first.weight)
    torch.testing.assert_close(layer.weight, want, rtol=1e-12, atol=1e-12)


def test_merging_twice_gives_the_same():
    layer = NEAT(nn.Linear(48, 24).double())
    perturb(layer)
    W = layer.base.weight.clone()
    first = layer.merged()["weight"]
    assert torch.equal(layer.merged()["weight"], first)
    assert torch.equal(layer.base.weight, W)


def test_dropout_is_on_the_way_to_the_change_only():
    layer = NEAT(nn.Linear(48, 24), dropout=0.5)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    perturb(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("arguments", [{"rank": 0}, {"depth": -1}])
def test_no_unit_or_a_negative_depth_is_refused(arguments):
    with pytest.raises(ValueError, match="use rank >= 1 and depth >= 0"):
        NEAT(nn.Linear(48, 24), **arguments)
