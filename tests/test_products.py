"""What methods compute with, against its definition: one autograd step each for thin products,
blocks and scales."""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from transformers.pytorch_utils import Conv1D

from adaptrank import PARAMETERIZATIONS, testing
from adaptrank.ops import low_rank
from adaptrank.parameterizations import DoRA, LoRA, Parameterization

N = (2, 3)


def draw(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("bias", "scale"), [(True, 1.0), (False, 1.0), (False, -1.7)])
@pytest.mark.parametrize("trained", ["UV", "U", "V"])
def test_a_thin_product_has_its_first_and_second_derivatives(bias, scale, trained):
    x, W, b = draw(*N, 6), draw(4, 6, grad=False), draw(4, grad=False) if bias else None
    U, V = draw(4, 2, grad="U" in trained), draw(2, 6, grad="V" in trained)
    torch.testing.assert_close(
        low_rank.linear(x, W, b, U, V, scale),
        F.linear(x, W + scale * U @ V, b),
        rtol=1e-12,
        atol=1e-12,
    )
    function = partial(low_rank.linear, x, W, b, scale=scale)
    leaves = [t for t in (U, V) if t.requires_grad]
    called = {
        "UV": function,
        "U": lambda u: function(U=u, V=V),
        "V": lambda v: function(U=U, V=v),
    }[trained]
    assert gradcheck(called, leaves)
    assert gradgradcheck(called, leaves)
    assert gradcheck(lambda x: low_rank.linear(x, W, b, U, V, scale), x)


@pytest.mark.parametrize(("fresh", "scale"), [(True, 1.0), (False, 1.0), (True, 0.3), (False, 3)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_what_is_accumulated_has_its_first_and_second_derivatives(fresh, scale, blocks):
    y, z, U = draw(*N, 4 * blocks), draw(*N, blocks, 2), draw(4, 2)
    function = lambda y, z, U: low_rank.accumulate(y * 1, z, U, fresh, scale)  # noqa: E731
    torch.testing.assert_close(
        function(y, z, U), y + scale * F.linear(z, U).flatten(-2), rtol=1e-12, atol=1e-12
    )
    assert gradcheck(function, (y, z, U))
    assert gradgradcheck(function, (y, z, U))


@pytest.mark.parametrize(("tokens", "rank"), [(0, 2), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_and_no_units(tokens, rank, dtype):
    x, W = torch.randn(tokens, 6, dtype=dtype, requires_grad=True), torch.randn(4, 6, dtype=dtype)
    U, V = torch.randn(4, rank, requires_grad=True), torch.randn(rank, 6, requires_grad=True)
    for y in (
        low_rank.linear(x, W, None, U, V),
        low_rank.accumulate(F.linear(x, W), F.linear(x, V.to(dtype)), U),
    ):
        assert torch.equal(y, F.linear(x, W))
        y.sum().backward()
        assert U.grad.shape == U.shape
        assert V.grad.shape == V.shape


@pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
def test_a_gradient_has_the_layout_of_its_factor(shape):
    x, W = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6)
    leaf, V = torch.randn(shape, requires_grad=True), torch.randn(2, 6)
    low_rank.linear(x, W, None, leaf if shape == (4, 2) else leaf.T, V).sum().backward()
    assert leaf.grad.stride() == leaf.stride()


def test_a_factor_that_a_subclass_overrides_is_the_one_that_is_computed_with():
    class Doubled(LoRA):
        def factors(self):
            U, V = super().factors()
            return 2 * U, V

    layer, x = Doubled(nn.Linear(6, 4), rank=2), torch.randn(3, 6)
    nn.init.normal_(layer.B)
    change = 2 * layer.scale * layer.B @ layer.A
    torch.testing.assert_close(layer(x), layer.base(x) + F.linear(x, change))


def test_only_a_layer_that_nobody_watches_is_not_called():
    layer = nn.Linear(6, 4).requires_grad_(False)
    assert low_rank.plain(layer) is not None
    assert low_rank.plain(Conv1D(4, 6).requires_grad_(False))[0].shape == (4, 6)
    assert low_rank.plain(nn.Linear(6, 4)) is None
    handle = layer.register_forward_hook(lambda *args: None)
    assert low_rank.plain(layer) is None
    handle.remove()
    assert low_rank.plain(layer) is not None
    layer.forward = lambda x: x
    assert low_rank.plain(layer) is None


def methods_with_a_fast_path():
    built = {
        name: cls
        for name, cls in PARAMETERIZATIONS.items()
        if cls.__module__.startswith("adaptrank.")
    }
    return [
        name
        for name, cls in built.items()
        if cls.wraps(nn.Linear(48, 24))
        and cls.forward_adapted is not Parameterization.forward_adapted
    ]


def run(layer, x, weights):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{name: p.grad for name, p in testing.trainable(layer).items()},
    }


@pytest.mark.parametrize("method", methods_with_a_fast_path())
def test_the_fast_path_is_the_plain_one_to_float32_rounding(method, monkeypatch):
    layer = PARAMETERIZATIONS[method](nn.Linear(48, 24))
    testing.perturb(layer, 0.1)
    x, weights = torch.randn(50, 48), torch.randn(50, 24)
    fast = run(layer, x, weights)
    monkeypatch.setattr(low_rank, "fits", lambda x: False)
    plain = run(layer, x, weights)
    for name, value in plain.items():
        torch.testing.assert_close(
            fast[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name
        )


@pytest.mark.parametrize("method", methods_with_a_fast_path())
def test_over_bf16_it_is_as_exact_as_its_rounding(method):
    """Output and gradients against float64 of the same numbers: a few roundings of bf16 (2^-8), and
    no more; of a smooth function, as a ReLU that rounding turns on or off has another gradient."""
    cls = PARAMETERIZATIONS[method]
    smooth = {"activation": "gelu"} if "activation" in inspect.signature(cls).parameters else {}
    layer = cls(nn.Linear(768, 96).bfloat16(), **smooth)
    testing.perturb(layer, 0.02)
    x, weights = torch.randn(200, 768).bfloat16(), torch.randn(200, 96).bfloat16()
    have = run(layer, x, weights)
    want = run(layer.double(), x.double(), weights.double())
    for name, value in want.items():
        if name in have and value is not None:
            error = (have[name].double() - value).norm() / value.norm()
            assert error < 2**-6, f"{name}: {error}"


def test_dora_starts_at_its_layer_to_the_bit_in_bf16():
    layer = DoRA(nn.Linear(96, 48).bfloat16())
    x = torch.randn(7, 96).bfloat16()
    assert torch.equal(layer(x), layer.base(x))
