"""Tests of HyperAdapt beside the common contract."""

import pytest
import torch
from torch import nn

from adaptrank.axes import cost_model, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import HyperAdapt
from adaptrank.testing import perturb


def plain(layer, x, da, dc):
    """The paper's formula, for autograd."""
    weight = (1 + da)[:, None] * layer.innermost.weight * (1 + dc)
    return nn.functional.linear(x, weight, layer.bias)


def both(layer, x, loss):
    """Gradients (x, da, dc) of the layer and of the plain formula."""
    x = x.clone().requires_grad_()
    loss(layer(x)).backward()
    have = [x.grad, layer.da.grad, layer.dc.grad]
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.da, layer.dc)]
    want = torch.autograd.grad(loss(plain(layer, *leaves)), leaves)
    return have, want


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-7, 0.05])
def test_gradients_are_those_of_the_plain_formula(bias, scale):
    layer = HyperAdapt(nn.Linear(48, 24, bias=bias).double())
    perturb(layer, 0.3)
    with torch.no_grad():
        layer.da[2], layer.dc[5] = (
            scale - 1,
            scale - 1,
        )  # one row and one column with an odd scale, zero among them
    have, want = both(layer, torch.randn(3, 5, 48, dtype=torch.float64), lambda y: y.square().sum())
    for a, b in zip(have, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.11, 0.09, 0.011, 0.001])
def test_bfloat16_gradients_do_not_blow_up_where_a_scale_is_small(scale):
    layer = HyperAdapt(nn.Linear(48, 24, bias=False).to(torch.bfloat16))
    with torch.no_grad():
        layer.da[2] = scale - 1
    x = torch.randn(64, 48).to(torch.bfloat16)
    layer(x).sum().backward()
    exact = torch.nn.functional.linear(x.double(), layer.innermost.weight.double())
    error = (layer.da.grad - exact.sum(0)).abs() / exact.abs().sum(0)
    assert (
        error.max() < 0.02
    )  # bfloat16 carries 1/256 of each term; a division by 0.011 would add tens of percent


@pytest.mark.parametrize("bias", [True, False])
def test_euler_identity(bias):
    """(t a, c / t) is the same layer, so sum a grad_a == sum c grad_c."""
    layer = HyperAdapt(nn.Linear(48, 24, bias=bias).double())
    perturb(layer, 0.3)
    layer(torch.randn(7, 48, dtype=torch.float64)).square().sum().backward()
    rows, cols = ((1 + layer.da) * layer.da.grad).sum(), ((1 + layer.dc) * layer.dc.grad).sum()
    torch.testing.assert_close(rows, cols, rtol=1e-11, atol=1e-11)


def test_the_rank_of_the_change_is_at_most_twice_that_of_the_weight():
    base = nn.Linear(48, 24).double()
    with torch.no_grad():
        base.weight.copy_(torch.randn(24, 3).double() @ torch.randn(3, 48).double())
    layer = HyperAdapt(base)
    perturb(layer, 0.3)
    assert torch.linalg.matrix_rank(layer.weight - base.weight) == 6


@pytest.mark.parametrize(
    ("rows", "cols", "count"), [(True, True, 72), (True, False, 24), (False, True, 48)]
)
def test_count(rows, cols, count):
    layer = HyperAdapt(nn.Linear(48, 24), rows=rows, cols=cols)
    assert cost_model(layer).total({}) == count
    assert not rank_axes(layer)


def test_one_of_rows_and_columns_must_train():
    with pytest.raises(ValueError, match="leave one of them on"):
        HyperAdapt(nn.Linear(4, 4), rows=False, cols=False)


def meta(shapes, blocks):
    layers = {name: nn.Linear(n, m, bias=False, device="meta") for name, (m, n) in shapes.items()}
    return nn.ModuleList(
        nn.ModuleDict(layers if i == 0 else {k: _like(v) for k, v in layers.items()})
        for i in range(blocks)
    )


def _like(linear):
    return nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")


@pytest.mark.parametrize(
    ("model", "shapes", "blocks", "count"),
    [
        ("RoBERTa-large q, v", {"q": (1024, 1024), "v": (1024, 1024)}, 24, 98_304),
        (
            "LLaMA-7B q, k, v, up, down",
            {**dict.fromkeys("qkv", (4096, 4096)), "up": (11008, 4096), "down": (4096, 11008)},
            32,
            1_753_088,
        ),
    ],
)
def test_printed_counts(model, shapes, blocks, count):
    assert cost_model(adapt(meta(shapes, blocks), "all-linear", HyperAdapt)).total({}) == count


@pytest.mark.parametrize("bias", [True, False])
def test_no_scaled_copy_is_kept(bias):
    """For the backward pass it keeps x and y: one tensor of each size, not two. Its own output may
    be overwritten."""
    layer = HyperAdapt(nn.Linear(48, 24, bias=bias))
    perturb(layer)
    x, kept = torch.randn(1000, 48), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    large = [t for t in kept if t.numel() >= 1000]
    inputs, outputs = ([t for t in large if t.shape[-1] == n] for n in (48, 24))
    # The frozen product keeps its weight only, for nothing but its input needs a gradient.
    assert {t.data_ptr() for t in inputs if t.shape[0] == 1000} == {x.data_ptr()}
    outputs = {t.data_ptr() for t in outputs if t.shape[0] == 1000}
    assert len(outputs) == 1
    assert outputs != {y.data_ptr()}


def test_two_hyperadapts_multiply():
    layer = HyperAdapt(HyperAdapt(nn.Linear(48, 24).double()))
    perturb(layer)
    inner, outer = layer.nest
    a = (1 + inner.da) * (1 + outer.da)
    c = (1 + inner.dc) * (1 + outer.dc)
    torch.testing.assert_close(
        layer.weight, a[:, None] * layer.innermost.weight * c, rtol=1e-12, atol=1e-12
    )
