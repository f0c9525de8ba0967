"""Tests of LoKr beside the common contract."""

import pytest
import torch
from test_hyperadapt import meta
from test_lora import total
from torch import nn

from adaptrank import testing
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoKr

LLAMA_32_3B = {"q": (3072, 3072), "v": (1024, 3072)}


def test_closed_count():
    build = testing.builder(LoKr, nn.Linear(48, 24))
    testing.check_parameter_count(build, lambda m, n: 4 * 6 + 4 * (6 + 8))


def test_printed_count():
    model = adapt(meta(LLAMA_32_3B, 28), "all-linear", lambda base: LoKr(base, rank=32, factor=4))
    assert total(model) == 2_294_656


@pytest.mark.parametrize(
    "arguments", [{"zero": "B"}, {"factor": 2}, {"rank": 1, "decompose_both": True}, {"factor": 1}]
)
def test_variants(arguments):
    base = nn.Linear(48, 24).double()
    build = testing.builder(LoKr, base, **arguments)
    testing.check_contract(build)
    testing.check_gradients(build)
    testing.check_low_precision(testing.builder(LoKr, nn.Linear(48, 24).bfloat16(), **arguments))
    testing.check_conv1d_twin(LoKr, arguments=arguments)
    if arguments != {
        "factor": 1
    }:  # there A is a number, and multiplying by it is no product of matrices
        testing.check_cost(testing.builder(LoKr, nn.Linear(48, 24), **arguments))


def test_what_starts_at_zero():
    zeros = {name: LoKr(nn.Linear(48, 24), zero=zero) for zero, name in (("A", "A"), ("B", "B1"))}
    for name, layer in zeros.items():
        assert [n for n, p in layer.own_parameters() if not p.any()] == [name]
    both = LoKr(nn.Linear(48, 24), rank=1, decompose_both=True)
    assert [n for n, p in both.own_parameters() if not p.any()] == ["A1"]
    assert hasattr(
        LoKr(nn.Linear(48, 24), rank=4, decompose_both=True), "A"
    )  # as large as A itself: left whole


def test_dropout_leaves_what_the_frozen_layer_reads():
    layer = LoKr(nn.Linear(48, 24), dropout=0.5)
    testing.perturb(layer)
    layer.dropout.p = 1.0
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))


def test_the_rank_of_the_change():
    layer = LoKr(nn.Linear(48, 24).double(), rank=2)
    testing.perturb(layer)
    assert torch.linalg.matrix_rank(layer.weight - layer.base_weight) == 2 * 4


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_does_not_fit(rank):
    with pytest.raises(
        ValueError, match=rf"rank={rank} does not fit B of 6x8 \(24x48 with factor=-1\); use 1 to 6"
    ):
        LoKr(nn.Linear(48, 24), rank=rank)


def test_both_sizes_may_be_stated():
    build = testing.builder(LoKr, nn.Linear(48, 24).double(), rank=2, factor=[2, 12])
    assert build().A.shape == (2, 12)
    testing.check_contract(build)
    with pytest.raises(
        ValueError, match=r"factor=\[5, 12\]: give one number, or two that divide 24"
    ):
        LoKr(nn.Linear(48, 24), factor=[5, 12])


def test_the_default_scale_is_that_of_peft():
    assert LoKr(nn.Linear(48, 24)).scale == 8 / 8


def test_errors():
    with pytest.raises(ValueError, match="zero='C' is no factor"):
        LoKr(nn.Linear(48, 24), zero="C")
