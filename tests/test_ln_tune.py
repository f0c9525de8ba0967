"""Tests of LNTune beside the common contract."""

import copy

import pytest
import torch
from test_residual_offset import IDS, llama
from torch import nn
from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from adaptrank import testing
from adaptrank.artifacts import load_adapter, merge, save_adapter, unmerge
from adaptrank.axes import cost_model
from adaptrank.injection import adapt
from adaptrank.parameterizations import LNTune, LoRA, wrapped_layers
from adaptrank.testing import assertions

NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(48),
    "LayerNorm without a shift": lambda: nn.LayerNorm(48, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(48),
    "T5LayerNorm": lambda: T5LayerNorm(48),
    "LlamaRMSNorm": lambda: LlamaRMSNorm(48),
    "GemmaRMSNorm": lambda: GemmaRMSNorm(48),
}


@pytest.fixture(params=NORMS.values(), ids=NORMS)
def norm(request):
    torch.manual_seed(0)
    layer = request.param()
    testing.perturb(layer, 0.3)
    return layer


def test_the_contract_with_the_closed_count():
    testing.check_parameterization(LNTune, count=lambda: 2 * 48)


def test_every_norm(norm, monkeypatch):
    if not isinstance(
        norm, (nn.LayerNorm, nn.RMSNorm)
    ):  # transformers' normalize in float32, whatever the model is in
        monkeypatch.setattr(assertions, "TOLERANCE", 1e-5)
    build = testing.builder(LNTune, norm.double())
    for check in (
        testing.check_identity,
        testing.check_definition,
        testing.check_exact_gradients,
        testing.check_training,
        testing.check_merged,
        testing.check_state_dict,
        testing.check_copies,
        testing.check_switch,
    ):
        check(build)
    testing.check_parameter_count(
        build, lambda: 96 if type(norm) is nn.LayerNorm and norm.bias is not None else 48
    )
    testing.check_low_precision(testing.builder(LNTune, copy.deepcopy(norm).to(torch.bfloat16)))


@pytest.mark.parametrize("arguments", [{"gain": False}, {"shift": False}], ids=str)
def test_one_of_gain_and_shift(arguments):
    build = testing.builder(LNTune, nn.LayerNorm(48).double(), **arguments)
    for check in (
        testing.check_identity,
        testing.check_definition,
        testing.check_gradients,
        testing.check_exact_gradients,
        testing.check_training,
        testing.check_merged,
        testing.check_state_dict,
        testing.check_switch,
        testing.check_arguments,
    ):
        check(build)
    testing.check_parameter_count(build, lambda: 48)
    testing.check_cost(testing.builder(LNTune, nn.LayerNorm(48), **arguments))
    testing.check_low_precision(
        testing.builder(LNTune, nn.LayerNorm(48).to(torch.bfloat16), **arguments)
    )


def test_the_formula(norm):
    """(g + dg) z + (b + db), where Gemma's gain is 1 + w."""
    layer = LNTune(norm.double())
    assert layer.plus_one is isinstance(norm, GemmaRMSNorm)
    testing.perturb(layer)
    x = torch.randn(5, 48).double()
    gain = layer.weight + (1 if layer.plus_one else 0)
    bare = copy.deepcopy(norm)
    with torch.no_grad():
        bare.weight.fill_(0.0 if layer.plus_one else 1.0)
        if getattr(bare, "bias", None) is not None:
            bare.bias.zero_()
    want = gain * bare(x) + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(
        layer(x), want, rtol=1e-6, atol=1e-6
    )  # some of them normalize in float32


def test_a_small_deviation_is_not_eaten_by_half_precision():
    """Of a gain of 1.0 in bfloat16 a deviation of 0.002 would be nothing: the next number is
    1.0078."""
    layer = LNTune(nn.LayerNorm(48).to(torch.bfloat16))
    x = torch.randn(64, 48).to(torch.bfloat16)
    with torch.no_grad():
        layer.dg += 0.002
    exact = 0.002 * nn.functional.layer_norm(x.float(), (48,))
    moved = (layer(x).float() - layer.base(x).float()).sum()
    assert (layer(x) != layer.base(x)).any()
    assert moved / exact.sum() != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_runs_once_where_it_starts_at_the_same_bits(norm, dtype):
    layer = LNTune(norm.to(dtype))
    x = torch.randn(64, 48).to(dtype)
    assert torch.equal(layer(x), norm(x))
    # T5 multiplies before it rounds, and the kernels of torch take one dtype.
    rounds_first = isinstance(norm, (LlamaRMSNorm, GemmaRMSNorm))
    testing.perturb(layer)
    runs = []
    norm.forward = lambda x, plain=norm.forward: runs.append(1) or plain(x)
    watched = layer(x)
    del norm.forward
    assert len(runs) == 2, "a replaced forward is called, for the output and for the change"
    assert layer._runs_once() is (dtype == torch.float32 or rounds_first)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x), watched, rtol=tolerance, atol=tolerance)


def test_printed_counts():
    with torch.device("meta"):
        llama_3b = LlamaModel(
            LlamaConfig(
                hidden_size=3072,
                intermediate_size=8192,
                num_hidden_layers=28,
                num_attention_heads=24,
                num_key_value_heads=8,
                vocab_size=128256,
            )
        )
        small = ViTModel(
            ViTConfig(
                hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
            ),
            add_pooling_layer=False,
        )
    assert cost_model(adapt(llama_3b, "all", LNTune)).total({}) == 57 * 3072 == 175_104
    assert cost_model(adapt(small, "all", LNTune)).total({}) == 25 * 768 == 19_200


def test_in_a_model_it_trains_saves_loads_and_merges(tmp_path):
    model = llama()
    plain = model(IDS).logits
    adapt(model, "all", LNTune)
    assert len(wrapped_layers(model)) == 5
    assert torch.equal(model(IDS).logits, plain)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    testing.perturb(model)
    want = model(IDS).logits
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(llama(), tmp_path)(IDS).logits, want)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    torch.testing.assert_close(
        merge(model, keep_originals=True)(IDS).logits, want, rtol=1e-5, atol=1e-6
    )
    assert set(model.state_dict()) == set(llama().state_dict())
    unmerge(model)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_it_stands_beside_other_methods(tmp_path):
    model = adapt(adapt(llama(), ["q_proj"], LoRA), "all", LNTune)
    testing.perturb(model)
    want = model(IDS).logits
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(llama(), tmp_path)(IDS).logits, want)


def test_what_it_refuses():
    with pytest.raises(
        ValueError,
        match=r"LNTune trains nothing of this LlamaRMSNorm, which has a gain only; say gain=True",
    ):
        LNTune(LlamaRMSNorm(4), gain=False)
    with pytest.raises(
        TypeError, match="LNTune wraps LayerNorm or RMSNorm with one gain a channel, not Linear"
    ):
        LNTune(nn.Linear(4, 4))
    for layer in (
        nn.LayerNorm(4, elementwise_affine=False),
        nn.LayerNorm((2, 4)),
        nn.BatchNorm1d(4),
    ):
        assert not LNTune.wraps(layer)
