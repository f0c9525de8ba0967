"""Tests of DoRA beside the common contract."""

import pytest
import torch
from test_hyperadapt import meta
from test_lora import LLAMA_7B, total
from torch import nn

from adaptrank.injection import adapt
from adaptrank.parameterizations import DoRA, LoRA
from adaptrank.testing import builder, check_parameter_count, perturb


def build(base=None, **arguments):
    layer = DoRA(base or nn.Linear(48, 24).double(), **arguments)
    perturb(layer)
    return layer


def test_closed_count():
    check_parameter_count(builder(DoRA, nn.Linear(48, 24)), lambda m, n: 8 * (m + n) + m)


def test_printed_count():
    assert (
        total(adapt(meta(LLAMA_7B, 32), "all-linear", lambda base: DoRA(base, rank=32)))
        == 56_975_360
    )


@pytest.mark.parametrize("nested", [False, True])
def test_the_cheap_norm_is_the_dense_one(nested):
    layer = build(LoRA(nn.Linear(48, 24).double()) if nested else None)
    V = layer.base_weight + layer.scale * layer.B @ layer.A
    torch.testing.assert_close(layer.row_norms(layer.B), V.norm(dim=1), rtol=1e-12, atol=1e-12)


def test_row_norms_of_the_merged_weight_are_the_magnitudes():
    layer = build()
    with torch.no_grad():
        layer.m[3] *= -1
    torch.testing.assert_close(layer.weight.norm(dim=1), layer.m.abs(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_the_detached_gradient_is_that_of_a_constant_norm(bias):
    layer = build(nn.Linear(48, 24, bias=bias).double())
    x = torch.randn(5, 48, dtype=torch.float64)
    layer(x).square().sum().backward()
    leaves = [t.detach().clone().requires_grad_() for t in (layer.A, layer.B, layer.m)]
    A, B, m = leaves
    V = layer.base.weight + layer.scale * B @ A
    norm = (layer.base.weight + layer.scale * layer.B @ layer.A).norm(dim=1).detach()
    y = nn.functional.linear(x, (m / norm)[:, None] * V, layer.bias)
    for have, want in zip(
        (layer.A, layer.B, layer.m), torch.autograd.grad(y.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(have.grad, want, rtol=1e-10, atol=1e-10)
    exact = build(nn.Linear(48, 24, bias=bias).double(), detach_norm=False)
    exact(x).square().sum().backward()
    assert not torch.allclose(exact.B.grad, layer.B.grad)


def test_dropout_reaches_the_scaled_product_as_well():
    layer = DoRA(nn.Linear(48, 24), dropout=0.5)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        layer.m *= 2  # no change of direction: what is random now is the product with W
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5
    )


def test_the_cached_norm_is_not_saved():
    layer = build()
    layer(torch.randn(2, 48, dtype=torch.float64))
    assert set(layer.state_dict()) == {"A", "B", "m", "base.weight", "base.bias"}
