"""Tests of sums of Kronecker products beside the common contract."""

import copy
import warnings

import pytest
import torch
from test_hyperadapt import meta
from test_lora import LLAMA_7B, total
from torch import nn

from adaptrank import testing
from adaptrank.injection import adapt
from adaptrank.parameterizations import Kronecker, kronecker
from adaptrank.parameterizations.kronecker import divisor


def build(base=None, **arguments):
    layer = Kronecker(base or nn.Linear(48, 24).double(), **arguments)
    testing.perturb(layer)
    return layer


def test_closed_count():
    build = testing.builder(Kronecker, nn.Linear(48, 24))
    testing.check_parameter_count(build, lambda m, n: 4 * (4 * 6 + 6 * 8))


def test_count_on_real_layers():
    """64 x 64 blocks of 64 x 64, or of 172 x 64: one product a layer."""
    model = adapt(meta(LLAMA_7B, 32), "all-linear", lambda base: Kronecker(base, rank=1))
    square, wide = 64 * 64 * 2, 86 * 64 + 128 * 64
    assert total(model) == 32 * (3 * square + 2 * wide)


@pytest.mark.parametrize("factor", [-1, 1, 3, 5, 24])
@pytest.mark.parametrize(
    "base", [nn.Linear(48, 24), nn.Embedding(48, 24), nn.Conv2d(12, 24, 2, padding=1)]
)
def test_every_factor_is_exact(base, factor):
    testing.check_contract(testing.builder(Kronecker, base.double(), rank=2, factor=factor))


def test_a_convolution_without_a_batch():
    layer = build(nn.Conv2d(12, 24, 2).double())
    x = torch.randn(12, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), layer.definition(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (6, 48), (48, 6)])
def test_both_orders_compute_the_same_and_the_cheaper_is_taken(shape, monkeypatch):
    m, n = shape
    layer = build(nn.Linear(n, m).double(), factor=3)
    x = torch.randn(5, n, dtype=torch.float64)
    taken, cost = layer._coarse_first(), layer.cost().flops
    results = []
    for coarse_first in (True, False):
        monkeypatch.setattr(layer, "_coarse_first", lambda first=coarse_first: first)
        results.append(layer(x))
        assert layer.cost().flops >= cost
        assert (layer.cost().flops == cost) or coarse_first != taken
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("m", "n", "coarse_first"), [(24, 48, True), (48, 24, False)])
def test_both_orders_cost_what_they_say(m, n, coarse_first):
    build = testing.builder(Kronecker, nn.Linear(n, m), rank=2)
    assert build()._coarse_first() == coarse_first
    testing.check_cost(build)


@pytest.mark.parametrize(
    "arguments", [{}, {"rank": 1}, {"rank": 8}, {"dropout": 0.5}, {"scale": 0.5}]
)
@pytest.mark.parametrize("conv1d", [False, True])
def test_many_tokens_compute_the_same_as_few(arguments, conv1d, monkeypatch):
    """Where the change is built once a call: outputs and gradients, and the start to the last
    bit."""
    base = nn.Linear(48, 24).double()
    layer = Kronecker(testing.conv1d(base) if conv1d else base, **arguments).eval()
    x = torch.randn(3, 40, 48, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), layer.base(x))
    testing.perturb(layer)
    thin = torch.cat([layer(part) for part in x.view(120, 48).split(1)]).view(3, 40, 24)
    torch.testing.assert_close(layer(x), thin, rtol=1e-11, atol=1e-11)
    leaves = [x, layer.A, layer.B]
    have, want = (torch.autograd.grad(y.square().sum(), leaves) for y in (layer(x), thin))
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    if "rank" not in arguments:
        monkeypatch.setattr(layer, "delta", None)  # the path for many tokens does not go through it
        layer(x)


def test_many_tokens_in_half_precision_keep_a_change_below_the_rounding_of_the_weight():
    layer = Kronecker(nn.Linear(48, 24, bias=False).bfloat16())
    nn.init.constant_(layer.base.weight, 1.0)
    nn.init.constant_(layer.A, 1.0)
    with torch.no_grad():
        layer.B[:, :, 0] = 1e-4
    x = torch.zeros(40, 48, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1, -1  # the frozen part cancels
    torch.testing.assert_close(layer(x).float(), torch.full((40, 24), 4e-4), rtol=1e-2, atol=0)


def test_many_tokens_in_half_precision_have_the_gradients_of_float32():
    base = nn.Linear(48, 24).bfloat16()
    half, single = (Kronecker(copy.deepcopy(base).to(t)) for t in (torch.bfloat16, torch.float32))
    testing.perturb(half), testing.perturb(single)
    single.load_state_dict(half.state_dict())
    x = torch.randn(40, 48).bfloat16()
    grads = []
    for layer in (half, single):
        leaf = x.to(layer.base.weight.dtype).requires_grad_()
        y = layer(leaf)
        leaves = [leaf, layer.A, layer.B]
        grads.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for have, want in zip(*grads, strict=True):
        largest = float(want.detach().abs().max())
        torch.testing.assert_close(have.float(), want, rtol=0, atol=0.02 * largest)


def test_both_products_have_second_derivatives():
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def change(A, B):
        return kronecker._Sum.apply(A, B, 0.5, torch.float64)

    W, bias = leaf(4, 6).detach(), leaf(4).detach()
    assert torch.autograd.gradgradcheck(change, (leaf(3, 2, 2), leaf(3, 2, 3)))
    assert torch.autograd.gradgradcheck(
        lambda x, D: kronecker._TwoProducts.apply(x, W, bias, D), (leaf(2, 3, 6), leaf(4, 6))
    )


@pytest.mark.parametrize("tokens", [2, 40])
def test_dropout_leaves_what_the_frozen_layer_reads(tokens):
    layer = build(dropout=0.5)
    layer.dropout.p = 1.0
    x = torch.randn(tokens, 48, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("tokens", [2, 40])
def test_hooks_of_the_frozen_layer_see_what_it_computes(tokens):
    layer, seen = build(), []
    x = torch.randn(tokens, 48, dtype=torch.float64)
    frozen = layer.base(x)
    want = layer(x)
    layer.base.register_forward_hook(lambda module, inputs, y: seen.append(y))
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    assert len(seen) == 1
    assert torch.equal(seen[0], frozen)


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_forward_that_someone_put_in_place_of_the_frozen_layers_is_called(tokens):
    """As libraries do that keep weights elsewhere until a layer is called."""
    layer, called = build(), []
    plain = layer.base.forward
    layer.base.forward = lambda x: called.append(1) or plain(x)
    layer(torch.randn(tokens, 48, dtype=torch.float64))
    assert called


@pytest.mark.parametrize("tokens", [2, 40])
def test_shapes_come_without_data(tokens):
    layer = Kronecker(nn.Linear(48, 24, device="meta"))
    assert layer(torch.empty(tokens, 48, device="meta")).shape == (tokens, 24)


def test_the_coarse_factor_starts_as_wide_as_its_inputs_say():
    A = Kronecker(nn.Linear(48, 4096), rank=64).A  # 64 x 6
    assert A.abs().max() <= 6**-0.5
    torch.testing.assert_close(A.var().item(), 1 / (3 * 6), rtol=0.05, atol=0)


def test_a_side_without_factors_is_said():
    with pytest.warns(
        UserWarning,
        match=r"64x1009 layer: with factor=-1 A is 8x1 and B 8x1009, 8,080 numbers a product",
    ):
        Kronecker(nn.Embedding(1009, 64))
    with pytest.warns(
        UserWarning, match=r"7x7 layer: with factor=4 A is 1x1 and B 7x7, 50 numbers a product"
    ):
        Kronecker(nn.Linear(7, 7), factor=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Kronecker(nn.Linear(768, 5))  # a head for five classes: 24 + 160 numbers
        Kronecker(nn.Linear(202, 3))  # three have nothing to divide
        Kronecker(nn.Conv2d(3, 64, 16))  # colours
        Kronecker(nn.Linear(7, 7), factor=1)  # asked for


def test_one_product_can_have_full_rank():
    layer = build(rank=1)
    assert torch.linalg.matrix_rank(layer.weight - layer.base_weight) == 24


def test_a_rearranged_change_has_one_rank_a_product():
    """Van Loan: as (m1 n1, m2 n2) a Kronecker product is a rank-one matrix, so the SVD recovers
    planted terms."""
    layer = build(rank=3)
    (_, m1, n1), (_, m2, n2) = layer.A.shape, layer.B.shape
    change = (layer.weight - layer.base_weight).detach()
    rearranged = change.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    U, S, Vh = torch.linalg.svd(rearranged)
    assert int((1e-10 * S[0] < S).sum()) == 3
    terms = [
        torch.kron((S[k] * U[:, k]).view(m1, n1).contiguous(), Vh[k].view(m2, n2).contiguous())
        for k in range(3)
    ]
    torch.testing.assert_close(sum(terms), change, rtol=1e-10, atol=1e-10)


def test_the_norm_of_a_unit_is_the_product_of_its_factors_norms():
    layer = build(rank=1)
    have = (layer.weight - layer.base_weight).norm()
    torch.testing.assert_close(have, layer.A.norm() * layer.B.norm(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "factor", "found"),
    [(48, -1, 6), (24, -1, 4), (768, -1, 24), (3072, 4, 4), (30, 4, 3), (7, -1, 1), (4, 9, 4)],
)
def test_divisors(size, factor, found):
    assert divisor(size, factor) == found


def test_errors():
    with pytest.raises(ValueError, match="rank=0: a Kronecker has at least one product"):
        Kronecker(nn.Linear(4, 4), rank=0)
    with pytest.raises(ValueError, match="factor=0: use -1 for factors as equal as possible"):
        Kronecker(nn.Linear(4, 4), factor=0)
