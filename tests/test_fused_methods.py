"""Methods whose layer is one autograd step: HyperAdapt, DoRA and LoKr over a linear layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from adaptrank import testing
from adaptrank.ops import kronecker_product, low_rank, magnitude, scaling
from adaptrank.parameterizations import DoRA, HyperAdapt, LoKr, LoRA

STEPS = {HyperAdapt: scaling, DoRA: magnitude, LoKr: kronecker_product}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(method, bias=True, **arguments):
    layer = method(nn.Linear(12, 8, bias=bias).double(), **arguments)
    testing.perturb(layer, 0.3)
    return layer


def count_steps(method, monkeypatch):
    """Count the calls of the step that the method is fused into."""
    calls, step = [], STEPS[method].linear
    monkeypatch.setattr(STEPS[method], "linear", lambda *args: calls.append(1) or step(*args))
    return calls


def derivatives(layer, x, weights):
    """First derivatives, and derivatives of the sum of their squares."""
    leaves = [x, *testing.trainable(layer).values()]
    first = torch.autograd.grad((layer(x).sin() * weights).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [*first, *second]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", STEPS)
def test_first_and_second_derivatives_are_those_of_the_plain_path(method, bias, monkeypatch):
    layer = build(method, bias)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 8, dtype=torch.float64)
    calls = count_steps(method, monkeypatch)
    have = derivatives(layer, x, weights)
    assert len(calls) == 1
    monkeypatch.setattr(low_rank, "fits", lambda x: False)
    for a, b in zip(have, derivatives(layer, x, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert len(calls) == 1


@pytest.mark.parametrize("method", STEPS)
def test_only_the_gradients_that_are_needed_are_computed(method):
    layer = build(method)
    x = torch.randn(3, 12, dtype=torch.float64)
    y = lambda: layer(x).square().sum()  # noqa: E731
    parameters = testing.trainable(layer)
    want = dict(zip(parameters, torch.autograd.grad(y(), list(parameters.values())), strict=True))
    for kept in parameters:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name == kept)
        layer.zero_grad()
        y().backward()
        for name, parameter in parameters.items():
            if name == kept:
                torch.testing.assert_close(parameter.grad, want[name])
            else:
                assert parameter.grad is None


@pytest.mark.parametrize("method", STEPS)
def test_a_layer_that_is_watched_is_called(method, monkeypatch):
    layer = build(method)
    x = torch.randn(3, 12, dtype=torch.float64)
    want, seen = layer(x), []
    calls = count_steps(method, monkeypatch)
    layer.base.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(layer(x), want)
    assert seen
    assert not calls


@pytest.mark.parametrize("method", STEPS)
def test_no_tokens(method):
    layer = build(method)
    x = torch.zeros(0, 12, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in testing.trainable(layer).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_offset", [True, False])
def test_the_sum_of_products_in_one_pass_is_exact(dtype, with_offset):
    g, z = torch.randn(2, 3, 50, 16).to(dtype)
    offset = torch.randn(16).to(dtype) if with_offset else None
    exact = z.double() if offset is None else z.double() - offset.double()
    want = (g.double() * exact).sum((0, 1))
    result = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        have = scaling.sum_of_products(g, z, result, offset)
        expanded = scaling.sum_of_products(g[:1, :1].expand_as(g), z, result, offset)
    assert have.dtype == result
    torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)
    want = (g[:1, :1].double() * exact).sum((0, 1))
    # A gradient that is expanded goes the ordinary way, with its rounding.
    rough = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    assert (expanded.double() - want).norm() < rough * want.norm()


def test_a_trained_bias_inside_has_its_gradients():
    y, d, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4), (4,), (4,))
    )
    assert gradcheck(scaling.scale_output, (y, d, bias))
    assert gradgradcheck(scaling.scale_output, (y, d, bias))


def test_the_norm_of_a_row_that_cancels_is_no_nan():
    A, B = torch.randn(3, 16), torch.randn(50, 3)
    W = -2 * B @ A
    norms = magnitude.row_norms(W, W.square().sum(1), A, B, 2.0)
    assert norms.isfinite().all()
    assert (norms < 1e-2 * W.norm(dim=1)).all()


def test_autocast_leaves_row_norms_exact():
    layer = DoRA(nn.Linear(96, 48))
    testing.perturb(layer, 0.1)
    want = layer.row_norms(layer.B)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.row_norms(layer.B), want)


def test_dora_draws_one_mask():
    layer, x = DoRA(nn.Linear(12, 8), dropout=0.5), torch.randn(5, 12)
    torch.manual_seed(1)
    layer(x)
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    F.dropout(x, 0.5)
    assert torch.equal(drawn, torch.get_rng_state())


def test_the_norms_of_frozen_rows_are_at_hand_before_a_graph_is_compiled():
    layer = DoRA(nn.Linear(12, 8))
    layer.base.weight.data *= 2
    layer.renew()
    torch.testing.assert_close(layer.squares, layer.base.weight.square().sum(1))


@pytest.mark.parametrize("method", [HyperAdapt, DoRA])
def test_a_bias_of_any_layout_gives_the_gradient_of_a_contiguous_one(method):
    torch.manual_seed(0)
    plain, x = nn.Linear(12, 8), torch.randn(5, 12)
    strided = copy.deepcopy(plain)
    strided.bias = nn.Parameter(torch.stack([plain.bias.detach()] * 2, 1)[:, 0])
    layers = []
    for linear in (plain, strided):
        torch.manual_seed(1)
        layers.append(method(linear))
        layers[-1](x).square().sum().backward()
    for one, other in zip(*(layer.own_parameters() for layer in layers), strict=True):
        torch.testing.assert_close(one[1].grad, other[1].grad)


def test_what_a_class_or_an_instance_states_of_itself_is_kept():
    class Off(LoRA):
        enabled = False

    layer, x = Off(nn.Linear(6, 4), rank=2), torch.randn(3, 6)
    nn.init.normal_(layer.B)
    assert torch.equal(layer(x), layer.base(x))
    layer.enabled = True
    U, V = layer.factors()
    layer.factors = lambda: (3 * U, V)
    torch.testing.assert_close(layer(x), layer.base(x) + 3 * F.linear(x, U @ V))
