"""Tests of MELoRA beside the common contract."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from test_hyperadapt import meta
from test_lora import total
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptrank import testing
from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA, MELoRA, MiSS, SBoRA
from adaptrank.testing import builder, perturb


def test_closed_count():
    testing.check_parameter_count(builder(MELoRA, nn.Linear(48, 24)), lambda m, n: m + n)


@pytest.mark.parametrize(
    ("arguments", "units"),
    [
        ({"rank": 3, "minis": 4}, 12),
        ({"rank": [1, 4, 2], "minis": 3}, 7),
        ({"rank": [5, 1], "minis": 2}, 6),
        ({"rank": 8, "minis": 1}, 8),
    ],
)
def test_variants(arguments, units):
    base = testing.example_bases(MELoRA)[0]
    build = builder(MELoRA, base, **arguments)
    testing.check_contract(build, count=lambda m, n: units * (m + n) // arguments["minis"])
    testing.check_cost(builder(MELoRA, copy.deepcopy(base).float(), **arguments))
    testing.check_low_precision(
        builder(MELoRA, copy.deepcopy(base).to(torch.bfloat16), **arguments)
    )
    testing.check_conv1d_twin(MELoRA, arguments=arguments)


def test_printed_counts():
    roberta_base = {"q": (768, 768), "v": (768, 768)}
    mini = total(
        adapt(meta(roberta_base, 12), "all-linear", lambda base: MELoRA(base, rank=1, minis=8))
    )
    full = total(adapt(meta(roberta_base, 12), "all-linear", lambda base: LoRA(base, rank=8)))
    assert (mini, full) == (36_864, 294_912)  # "8 times fewer"


def test_one_mini_is_lora():
    layer = MELoRA(nn.Linear(48, 24).double(), rank=5, minis=1)
    perturb(layer)
    lora = LoRA(copy.deepcopy(layer.base), rank=5)
    lora.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "block"})
    torch.testing.assert_close(layer.weight, lora.weight, rtol=1e-12, atol=1e-12)


def test_the_blocks_written_out_and_the_scale_of_each():
    layer = MELoRA(nn.Linear(6, 4).double(), rank=[1, 2], minis=2, alpha=4)
    perturb(layer)
    want = layer.base.weight.clone()
    want[:2, :3] += 4 * layer.B[:, :1] @ layer.A[:1]
    want[2:, 3:] += 2 * layer.B[:, 1:] @ layer.A[1:]
    torch.testing.assert_close(layer.weight, want, rtol=1e-12, atol=1e-12)
    rank_axes(layer)[":rank"].resize([0, 2], 2, generator(0, "a", 1))
    assert layer.scales.tolist() == [4, 2]


def test_the_rank_of_the_change_is_the_number_of_units():
    layer = MELoRA(nn.Linear(48, 24).double(), rank=2, minis=4)
    perturb(layer)
    assert torch.linalg.matrix_rank(layer.weight - layer.base.weight) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_off_the_diagonal_keep_every_bit(dtype):
    layer = MELoRA(nn.Linear(48, 24).to(dtype), rank=2, minis=4)
    perturb(layer)
    off = torch.block_diag(*[torch.ones(6, 12)] * 4) == 0
    assert torch.equal(layer.weight[off], layer.base.weight[off])
    assert not torch.equal(layer.weight[~off], layer.base.weight[~off])


def test_a_slice_of_the_output_sees_its_slice_of_the_input_only():
    layer = MELoRA(nn.Linear(48, 24).double(), rank=2, minis=4)
    perturb(layer)
    x, other = torch.randn(3, 48).double(), torch.randn(3, 48).double()
    other[:, 12:24] = x[:, 12:24]
    change, changed = (layer(v) - layer.base(v) for v in (x, other))
    torch.testing.assert_close(change[:, 6:12], changed[:, 6:12], rtol=1e-10, atol=1e-10)


def test_a_mini_may_end_without_units_and_is_the_first_to_get_one():
    layer = MELoRA(nn.Linear(48, 24).double(), rank=2, minis=4)
    perturb(layer)
    axis, x = rank_axes(layer)[":rank"], torch.randn(3, 48).double()
    axis.resize([7, 0, 4, 2])
    assert layer.block.tolist() == [3, 0, 0, 2]
    torch.testing.assert_close(layer(x), layer.definition(x), rtol=1e-10, atol=1e-10)
    axis.resize(grow=4, generator=generator(0, ":rank", 1))
    assert layer.block.tolist() == [3, 0, 0, 2, 1, 1, 2, 3]
    assert set(Counter(layer.block.tolist()).values()) == {2}
    assert layer.A[4:].abs().max() <= 12**-0.5
    assert cost_model(layer).marginal(":rank", {":rank": 8}) == (48 + 24) // 4


def test_the_first_units_are_spread_evenly():
    layer = MELoRA(nn.Linear(48, 24), rank=[2, 1, 3, 2], minis=4)
    assert layer.block.tolist() == [0, 1, 2, 3, 0, 2, 3, 2]
    assert rank_axes(layer)[":rank"].step == 4


def test_the_order_of_units_does_not_matter():
    layer = MELoRA(nn.Linear(48, 24).double(), rank=2, minis=4)
    perturb(layer)
    before = layer.weight
    rank_axes(layer)[":rank"].resize([3, 7, 0, 1, 6, 2, 5, 4])
    torch.testing.assert_close(layer.weight, before, rtol=1e-12, atol=1e-12)


def test_dropout_is_on_the_way_to_a_only():
    layer = MELoRA(nn.Linear(48, 24), dropout=0.5)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    perturb(layer)
    assert not torch.equal(layer(x), layer(x))


def test_a_fused_projection_is_split():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = Conv1D(72, 24)

    model = adapt(nn.ModuleDict({"attn": Attention()}), "all-linear", partial(MELoRA, minis=4))
    assert len(rank_axes(model)) == 3


@pytest.mark.parametrize("method", [MELoRA, MiSS, partial(SBoRA, variant="fb")])
def test_buffers_may_be_written_between_two_forward_passes_and_their_backward_pass(method):
    """Data parallel training writes the buffers of the first process into the others' so."""
    layer = method(nn.Linear(48, 24), dropout=0.1)
    outputs = []
    for _ in range(2):
        outputs.append(layer(torch.randn(5, 48)))
        for buffer in layer.buffers():
            buffer.copy_(buffer.clone())
    sum(outputs).sum().backward()
    assert all(p.grad is not None for _, p in layer.own_parameters())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"minis": 5},
            r"minis=5 does not divide a 24x48 layer; use one of \[1, 2, 3, 4, 6, 8, 12, 24\]",
        ),
        ({"minis": 0}, "minis=0 does not divide"),
        ({"rank": 0}, "of 1 or more"),
        ({"rank": [1, 2], "minis": 3}, "3 minis need one rank each"),
        ({"rank": [1, 0], "minis": 2}, "of 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MELoRA(nn.Linear(48, 24), **arguments)
