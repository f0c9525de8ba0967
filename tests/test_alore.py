"""Tests of ALoRE beside the common contract."""

import math

import pytest
import torch
from test_hyperadapt import meta
from test_lora import total
from torch import nn

from adaptrank import testing
from adaptrank.artifacts import merge
from adaptrank.injection import adapt
from adaptrank.parameterizations import PARAMETERIZATIONS, ALoRE

VIT_B = {"attn": (768, 768), "mlp": (768, 768)}  # two modules of the width in each of 12 blocks


def test_closed_count():
    build = testing.builder(ALoRE, nn.Linear(48, 24))
    testing.check_parameter_count(build, lambda m, n: 4 * (16 + 4 * (m + n) // 4))


def test_printed_count():
    """0.15M for ViT-B in the abstract; that its modules have rank 4, 4 blocks and no bias is
    inferred from that."""
    assert total(adapt(meta(VIT_B, 12), "all-linear", ALoRE)) == 148_992


@pytest.mark.parametrize("bias", [True, False])
def test_before_the_layer(bias):
    build = testing.builder(ALoRE, nn.Linear(48, 24, bias=bias).double(), placement="pre")
    testing.check_gradients(build)
    testing.check_contract(build, count=lambda m, n: 4 * (16 + 4 * 2 * n // 4))
    testing.check_cost(testing.builder(ALoRE, nn.Linear(48, 24), placement="pre"))
    testing.check_low_precision(
        testing.builder(ALoRE, nn.Linear(48, 24).bfloat16(), placement="pre")
    )
    testing.check_conv1d_twin(ALoRE, arguments={"placement": "pre"})


def test_re_parameterization():
    """W' = W (I + s D), and the bias stays."""
    layer = ALoRE(nn.Linear(48, 24).double(), placement="pre", scale=0.5)
    testing.perturb(layer)
    D = sum(
        torch.kron(s.contiguous(), u @ v) for s, u, v in zip(layer.S, layer.U, layer.V, strict=True)
    )
    want = layer.base.weight @ (torch.eye(48) + 0.5 * D)
    torch.testing.assert_close(layer.weight, want, rtol=1e-12, atol=1e-12)
    holder = nn.Sequential(layer)
    x, bias = torch.randn(3, 48, dtype=torch.float64), layer.base.bias.clone()
    before = holder(x)
    merge(holder)
    torch.testing.assert_close(holder(x), before, rtol=1e-10, atol=1e-10)
    assert torch.equal(holder[0].bias, bias)


def test_row_vector_code_is_the_same_with_transposed_factors():
    """Others compute x H with H = sum_k S_k kron E_k; then H^T = sum_k S_k^T kron E_k^T is the
    change."""
    layer = ALoRE(nn.Linear(48, 24).double())
    testing.perturb(layer)
    H = sum(
        torch.kron(s.T.contiguous(), (u @ v).T.contiguous())
        for s, u, v in zip(layer.S, layer.U, layer.V, strict=True)
    )
    torch.testing.assert_close(H.T, layer.weight - layer.base.weight, rtol=1e-12, atol=1e-12)


def test_experts_are_independent_of_the_number_of_blocks():
    layer = ALoRE(nn.Linear(48, 24), experts=7, blocks=2, rank=3)
    assert (layer.S.shape, layer.U.shape, layer.V.shape) == ((7, 2, 2), (7, 12, 3), (7, 3, 24))


@pytest.mark.parametrize("placement", ["parallel", "pre"])
@pytest.mark.parametrize(
    "arguments", [{"experts": 3, "blocks": 2, "rank": 2}, {"experts": 2, "blocks": 6, "rank": 1}]
)
def test_any_number_of_experts(placement, arguments):
    """Where experts, blocks and rank differ, a formula that mixes them up is wrong."""
    build = testing.builder(ALoRE, nn.Linear(48, 24).double(), placement=placement, **arguments)
    testing.check_contract(build)
    testing.check_cost(testing.builder(ALoRE, nn.Linear(48, 24), placement=placement, **arguments))


def test_ceilings():
    """Experts have none; more ranks than an expert's shorter side would say nothing new."""
    parallel, pre = ALoRE(nn.Linear(48, 24)), ALoRE(nn.Linear(48, 24), placement="pre")
    assert (parallel.max_units("rank"), pre.max_units("rank")) == (6, 12)
    assert parallel.max_units("experts") is None


def test_start():
    layer = ALoRE(nn.Linear(480, 24), experts=400, blocks=8, rank=3)
    torch.testing.assert_close(layer.S.var().item(), 1 / 8, rtol=0.05, atol=0)
    assert layer.V.abs().max() <= math.sqrt(8 / 480)
    torch.testing.assert_close(layer.V.var().item(), 8 / 480 / 3, rtol=0.05, atol=0)
    assert not layer.U.any()


@pytest.mark.parametrize("placement", ["parallel", "pre"])
def test_dropout_leaves_what_the_frozen_layer_reads(placement):
    layer = ALoRE(nn.Linear(48, 24), dropout=0.5, placement=placement)
    testing.perturb(layer)
    layer.dropout.p = 1.0
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))


def test_errors():
    with pytest.raises(
        ValueError,
        match=r"blocks=5 does not divide a 24x48 change; use one of \[1, 2, 3, 4, 6, 8, 12, 24\]",
    ):
        ALoRE(nn.Linear(48, 24), blocks=5)
    with pytest.raises(
        ValueError,
        match="rank=7, experts=4 with 4 blocks do not fit a 24x48 change; use ranks of 1 to 6",
    ):
        ALoRE(nn.Linear(48, 24), rank=7)
    with pytest.raises(ValueError, match="placement='post' is unknown"):
        ALoRE(nn.Linear(48, 24), placement="post")
    with pytest.raises(
        ValueError,
        match=r"ALoRE takes the weight of what it wraps, .* put TensorTrainAdapter outermost",
    ):
        ALoRE(PARAMETERIZATIONS["TensorTrainAdapter"](nn.Linear(48, 24)), placement="pre")
