"""Tests of LoRA beside the common contract."""

import math

import pytest
import torch
from test_hyperadapt import meta
from torch import nn

from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA
from adaptrank.testing import builder, check_parameter_count, perturb

LLAMA_7B = {**dict.fromkeys("qkv", (4096, 4096)), "up": (11008, 4096), "down": (4096, 11008)}


def total(model):
    return cost_model(model).total({key: len(axis) for key, axis in rank_axes(model).items()})


def test_closed_count():
    check_parameter_count(builder(LoRA, nn.Linear(48, 24)), lambda m, n: 8 * (m + n))


def test_printed_counts():
    assert (
        total(adapt(meta(LLAMA_7B, 32), "all-linear", lambda base: LoRA(base, rank=32)))
        == 56_098_816
    )
    roberta_base = meta({"q": (768, 768), "v": (768, 768)}, 12)
    assert total(adapt(roberta_base, "all-linear", lambda base: LoRA(base, rank=8))) == 294_912


def test_the_rank_of_the_change():
    layer = LoRA(nn.Linear(48, 24).double(), rank=5)
    perturb(layer)
    assert torch.linalg.matrix_rank(layer.weight - layer.base.weight) == 5


def test_scale():
    assert LoRA(nn.Linear(48, 24), rank=4, alpha=16).scale == 4
    assert LoRA(nn.Linear(48, 24), rank=4, alpha=16, rslora=True).scale == 8


def test_the_scale_stays_when_the_rank_moves():
    layer = LoRA(nn.Linear(48, 24), rank=4, alpha=16)
    rank_axes(layer)[":rank"].resize([0], 7, generator(0, "a", 1))
    assert layer.scale == 4
    assert layer.init_args["rank"] == 4


def test_inits():
    kaiming = LoRA(nn.Linear(400, 24), rank=50).A
    assert kaiming.abs().max() <= 1 / math.sqrt(400)
    torch.testing.assert_close(
        kaiming.var().item(), 1 / (3 * 400), rtol=0.05, atol=0
    )  # of U(-1/sqrt(n), 1/sqrt(n))
    gaussian = LoRA(nn.Linear(400, 24), rank=50, init="gaussian").A
    torch.testing.assert_close(gaussian.std().item(), 1 / 50, rtol=0.05, atol=0)
    rows = LoRA(nn.Linear(48, 24).double(), rank=8, init="orthogonal").A
    torch.testing.assert_close(rows @ rows.T, torch.eye(8).double(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="needs rank <= 48, the layer's inputs; got rank=60"):
        LoRA(nn.Linear(48, 24), rank=60, init="orthogonal")


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank={rank}"):
        LoRA(nn.Linear(48, 24), rank=rank)


def test_both_factors_of_a_unit_agree_on_its_gate():
    """a_k . grad a_k == b_k . grad b_k, because a unit is linear in each factor."""
    layer = LoRA(nn.Linear(48, 24).double())
    perturb(layer)
    layer(torch.randn(5, 48, dtype=torch.float64)).square().sum().backward()
    a, b = (layer.A * layer.A.grad).sum(1), (layer.B * layer.B.grad).sum(0)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(rank_axes(layer)[":rank"].gate_grad(), b, rtol=1e-11, atol=1e-11)


def test_dropout_is_on_the_way_to_a_only_and_off_in_evaluation():
    layer = LoRA(nn.Linear(48, 24), dropout=0.5)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    perturb(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5
    )
