"""Tests of PiCa beside the common contract."""

import copy
from functools import partial

import pytest
import torch
from test_hyperadapt import meta
from test_lora import total
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from adaptrank import testing
from adaptrank.artifacts import load_adapter, merge, save_adapter
from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA, PiCa, wrapped_layers

GEMMA_2B = {
    "q": (2048, 2048),
    "k": (256, 2048),
    "v": (256, 2048),
    "up": (16384, 2048),
    "down": (2048, 16384),
}
GEMMA_7B = {**dict.fromkeys("qkv", (4096, 3072)), "up": (24576, 3072), "down": (3072, 24576)}
LLAMA3_8B = {
    **{"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)},
    **{"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)},
}


def build(base=None, **arguments):
    layer = PiCa(base or nn.Linear(48, 24).double(), **arguments)
    testing.perturb(layer)
    return layer


def blocks(seed=0, **arguments):
    """Three blocks of two kinds of layers, adapted and away from the start; the base is the same at
    every seed."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Sequential() for _ in range(3)))
    for block in plain:
        for name in ("q_proj", "up_proj"):
            block.add_module(name, nn.Linear(48, 48))
    plain.double()
    if arguments.pop("bare", False):
        return plain
    model = adapt(plain, "all-linear", lambda base: PiCa(base, **arguments))
    testing.perturb(model, seed=seed)
    return model


def test_closed_count():
    testing.check_parameter_count(testing.builder(PiCa, nn.Linear(48, 24)), lambda m, n: 8 * m)


@pytest.mark.parametrize(
    "arguments", [{"side": "output"}, {"rank": 24}, {"side": "output", "share": False}], ids=str
)
def test_the_contract_of_variants(arguments):
    for base in testing.example_bases(PiCa):
        testing.check_contract(testing.builder(PiCa, base, **arguments))
        testing.check_low_precision(
            testing.builder(PiCa, copy.deepcopy(base).bfloat16(), **arguments)
        )
    testing.check_cost(testing.builder(PiCa, nn.Linear(48, 24), **arguments))
    testing.check_conv1d_twin(PiCa, arguments=arguments)


@pytest.mark.parametrize(
    ("shapes", "layers", "rank", "count"),
    [
        (GEMMA_2B, 18, 256, 5_373_952),
        (GEMMA_2B, 18, 32, 671_744),
        (LLAMA3_8B, 32, 256, 11_010_048),
        (LLAMA3_8B, 32, 32, 1_376_256),
        (GEMMA_7B, 28, 256, 10_223_616),
        (GEMMA_7B, 28, 16, 638_976),  # printed as 0.64M for rank 32, which it cannot be
    ],
)
def test_printed_counts(shapes, layers, rank, count):
    assert (
        total(adapt(meta(shapes, layers), "all-linear", lambda base: PiCa(base, rank=rank)))
        == count
    )


def test_unshared_counts():
    model = adapt(meta(GEMMA_2B, 18), "all-linear", lambda base: PiCa(base, rank=32, share=False))
    assert total(model) == 18 * 671_744
    assert len(rank_axes(model)) == 18 * 5
    assert PiCa.shared == ("M",)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("size", [(48, 24), (24, 48)])
def test_p_is_orthonormal_and_leads_the_spectrum(side, size):
    layer = build(nn.Linear(*size).double(), rank=5, side=side)
    W, change = layer.base.weight, layer.weight - layer.base.weight
    P = layer.P if side == "input" else layer.P.T
    torch.testing.assert_close(P @ P.T, torch.eye(5).double(), rtol=1e-12, atol=1e-12)
    kept = (W @ P.T if side == "input" else P @ W).norm()
    torch.testing.assert_close(kept, torch.linalg.svdvals(W)[:5].norm(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(change.norm(), layer.M.norm(), rtol=1e-12, atol=1e-12)
    assert (P.gather(1, P.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("side", ["input", "output"])
def test_fresh_units_are_the_next_directions_and_pruned_ones_come_back(side):
    layer = build(rank=6, side=side)
    axis, whole = rank_axes(layer)[":rank"], PiCa(layer.base, rank=24, side=side).P
    axis.resize([0, 1, 3, 5], 3, generator(0, axis.key, 0))
    assert layer.index.tolist() == [0, 1, 3, 5, 2, 4, 6]
    torch.testing.assert_close(
        layer.P, whole.index_select(0 if side == "input" else 1, layer.index)
    )


def test_directions_are_those_of_the_frozen_weight_whatever_trains_inside():
    inner = LoRA(nn.Linear(48, 24).double())
    testing.perturb(inner)
    layer = PiCa(inner, rank=4)
    rank_axes(layer)[".1:rank"].resize(grow=4)
    assert torch.equal(layer.P, PiCa(inner.base, rank=8).P)


def test_layers_of_a_kind_train_one_factor():
    model = blocks(rank=4)
    assert list(rank_axes(model)) == ["0.q_proj:rank", "0.up_proj:rank"]
    assert total(model) == 4 * (48 + 48)
    assert model[0].q_proj.M is model[2].q_proj.M
    assert model[0].q_proj.M is not model[0].up_proj.M
    assert not torch.equal(model[0].q_proj.P, model[1].q_proj.P)


def test_the_gradient_of_a_shared_factor_is_the_sum_over_its_layers():
    model, alone = blocks(rank=4), blocks(rank=4, share=False)
    for block, own in zip(model, alone, strict=True):
        for name in ("q_proj", "up_proj"):
            getattr(own, name).M.data.copy_(getattr(block, name).M)
    x = torch.randn(5, 48, dtype=torch.float64)
    for one in (model, alone):
        one(x).square().sum().backward()
    for name in ("q_proj", "up_proj"):
        parts = sum(getattr(block, name).M.grad for block in alone)
        torch.testing.assert_close(getattr(model[0], name).M.grad, parts, rtol=1e-11, atol=1e-11)


def test_an_axis_resizes_every_layer_that_shares_it():
    model, x = blocks(rank=4), torch.randn(5, 48, dtype=torch.float64)
    axis, y = rank_axes(model)["0.q_proj:rank"], model(x).detach()
    assert [slot.label for slot in axis.slots()] == [
        *("P", "index", "P@1", "index@1", "P@2", "index@2", "M"),
    ]
    sizes = {key: len(other) for key, other in rank_axes(model).items()}
    assert cost_model(model).marginal(axis.key, sizes) == 48
    axis.resize(grow=2, generator=generator(0, axis.key, 1))
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    for block in model:
        assert block.q_proj.P.shape == (6, 48)
        assert block.q_proj.index.tolist() == [0, 1, 2, 3, 4, 5]
        assert block.q_proj.M is model[0].q_proj.M
        assert block.up_proj.P.shape == (4, 48)


def test_an_adapter_brings_its_directions_along(tmp_path, monkeypatch):
    """Where the decomposition comes out with other signs, a P computed anew would be wrong: it is
    read."""
    model, x = blocks(rank=4), torch.randn(5, 48, dtype=torch.float64)
    rank_axes(model)["0.q_proj:rank"].resize([0, 2, 3], 2, generator(0, "a", 1))
    y = model(x)
    save_adapter(model, tmp_path)
    state = copy.deepcopy(model.state_dict())
    straight = PiCa._directions
    monkeypatch.setattr(PiCa, "_directions", lambda self, index: -straight(self, index))
    again = load_adapter(blocks(bare=True), tmp_path)
    assert torch.equal(again(x), y)
    assert again[0].q_proj.M is again[2].q_proj.M
    other = blocks(rank=4, seed=3)
    rank_axes(other)["0.q_proj:rank"].resize(grow=1)
    assert not torch.allclose(other(x), y)
    other.load_state_dict(state)
    assert torch.equal(other(x), y)
    torch.testing.assert_close(merge(again)(x), y, rtol=1e-10, atol=1e-10)


def test_fused_projections_are_split():
    config = GPT2Config(
        n_embd=24,
        n_layer=2,
        n_head=2,
        vocab_size=30,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config)
    for _ in range(2):
        adapt(model, ["c_attn"], partial(PiCa, rank=4))
        assert [path.rsplit(".", 1)[-1] for path in wrapped_layers(model)] == ["q", "k", "v"] * 2
        assert total(model) == 3 * 4 * 24


def test_every_number_has_a_gradient_at_once():
    layer = PiCa(nn.Linear(48, 24))
    layer(torch.randn(5, 48)).square().sum().backward()
    assert layer.M.grad.abs().min() > 0


def test_half_precision_layers_have_directions_in_float32():
    layer = PiCa(nn.Linear(48, 24).to(torch.bfloat16))
    assert layer.P.dtype == torch.float32
    torch.testing.assert_close(layer.P @ layer.P.T, torch.eye(8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rank": 0}, "rank=0 does not fit a 24x48 layer; use 1 to 24"),
        ({"rank": 25}, "rank=25 does not fit a 24x48 layer; use 1 to 24"),
        ({"side": "left"}, "side='left' is unknown; use 'input' or 'output'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        PiCa(nn.Linear(48, 24), **arguments)
