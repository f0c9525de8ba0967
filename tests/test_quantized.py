"""Adapters over quantized layers: torchao's int8 weights, bitsandbytes' 8 and 4 bits; all of them
run on a CPU."""

import copy
import json
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import adapt, layers, load_adapter, merge, rank_axes, save_adapter
from adaptrank.artifacts import describe_adapter
from adaptrank.axes import cost_model
from adaptrank.injection import disabled
from adaptrank.parameterizations import DoRA, HyperAdapt, LoRA, wrapped_layers
from adaptrank.testing import merges, perturb, trainable


def int8(model):
    """torchao's int8 weight-only, in place."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def torchao_int8(linear):
    return int8(nn.Sequential(copy.deepcopy(linear)))[0]


def bnb(linear, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    (m, n), bias = linear.weight.shape, linear.bias is not None
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(n, m, bias=bias, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(
            n, m, bias=bias, quant_type=kind, compute_dtype=torch.float32
        )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # which is when it quantizes


KINDS = {
    "torchao int8": torchao_int8,
    "bitsandbytes int8": partial(bnb, kind="int8"),
    "bitsandbytes nf4": partial(bnb, kind="nf4"),
    "bitsandbytes fp4": partial(bnb, kind="fp4"),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def quantize(request):
    return request.param


LINEAR_METHODS = [cls for cls in METHODS if isinstance(cls.example(), nn.Linear)]


@pytest.fixture(params=LINEAR_METHODS, ids=lambda cls: cls.__name__)
def method(request):
    return request.param


def unless_refused(method, make):
    """What `make` returns, or None where the method says in a sentence that it needs a weight that
    is not quantized."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        sentence = str(error)
    assert method.reads_weight or method.reads_blocks, (
        f"it needs no dense weight, and has no reason to refuse: {sentence}"
    )
    assert "quantized" in sentence
    return None


def rounding(layer, x, W):
    """How far the layer may be from a product with its dequantized weight.

    bitsandbytes' int8 rounds each row of x to 127 steps as well: half a step of the largest, times
    the weights it meets. The others differ by the order of a float32 sum.
    """
    if hasattr(layer.innermost, "state"):
        return float(1.1 * x.abs().max() / 254 * W.abs().sum(1).max()) + 1e-4
    return 1e-4


def test_a_method_over_a_quantized_layer(method, quantize):
    base = quantize(method.example())
    assert layers.quantized(base)
    codes = base.weight.data.clone()
    layer = unless_refused(method, lambda: method(base))
    if layer is None:
        return
    x = torch.randn(2, 3, base.in_features, requires_grad=True)
    if method.starts_at_base:
        assert torch.equal(layer(x), layer.base(x))
    assert all(p.dtype == torch.float32 for p in trainable(layer).values())
    perturb(layer)
    y = layer(x)
    y.square().mean().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    for name, parameter in trainable(layer).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert base.weight.grad is None
    assert torch.equal(layers.readable(base.weight.data), layers.readable(codes)), "the codes moved"
    if merges(layer):
        W = layer.dense().detach()
        want = F.linear(x, W, layer.bias)
        # A scale on the input changes what is rounded; twice the bound is room for a perturbation
        # of 0.1.
        torch.testing.assert_close(y, want, rtol=1e-4, atol=2 * rounding(layer, x.detach(), W))
    assert layer.weight.shape == layer.shape


def test_the_dense_weight_is_what_the_layer_computes_with(quantize):
    linear = nn.Linear(64, 24)
    layer = quantize(linear)
    eye = torch.eye(64)
    for _ in range(2):  # the first forward of bitsandbytes' int8 moves its scales to another place
        W = layers.dense(layer, torch.float32)
        assert W.shape == (24, 64)
        torch.testing.assert_close(
            W, layer(eye).T.detach() - layer.bias[:, None], rtol=1e-4, atol=1e-4
        )
    exact = linear.weight
    assert 0 < (W - exact).norm() / exact.norm() < 0.2
    assert layers.shape(layer) == (24, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_half_precision_the_adapter_is_float32(dtype, quantize):
    base = quantize(nn.Linear(64, 32).to(dtype))
    layer = LoRA(base, rank=4)
    assert layer.A.dtype == torch.float32
    x = torch.randn(3, 64, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    assert layer(x).dtype == dtype
    perturb(layer)
    layer(x).float().sum().backward()
    assert layer.A.grad.dtype == torch.float32
    assert layer.A.grad.any()


def test_a_weight_that_is_to_be_quantized_is_an_ordinary_one_until_then():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for cls in (
        bitsandbytes.nn.Linear4bit,
        partial(bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False),
    ):
        layer = cls(64, 32)
        assert not layers.quantized(layer)
        assert torch.equal(layers.dense(layer, torch.float32), layer.weight)
        assert layers.quantized(layer.to("cpu"))


# ---- models


def llama(quantized=True, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    if not quantized:
        return model
    int8(model.model)  # the tied head stays what it is
    return model


IDS = torch.arange(1, 13).reshape(2, 6)


def logits(model):
    return model(IDS).logits


def test_a_quantized_llama_trains(method):
    model = llama()
    want = logits(model)
    if unless_refused(method, lambda: adapt(model, "all-linear", method)) is None:
        return
    assert len(wrapped_layers(model)) == 14
    if method.starts_at_base:
        assert torch.equal(logits(model), want)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    first = model(IDS, labels=IDS).loss
    first.backward()
    optimizer.step()
    assert model(IDS, labels=IDS).loss < first
    for layer in wrapped_layers(model).values():
        assert layers.quantized(layer.innermost)
    json.dumps(describe_adapter(model))
    assert cost_model(model).total({key: len(axis) for key, axis in rank_axes(model).items()}) > 0


def test_a_quantized_model_is_not_merged_and_stays_as_it_is():
    model = adapt(llama(), "all-linear", [HyperAdapt, LoRA])
    perturb(model)
    want, modules = logits(model), list(model.modules())
    with pytest.raises(
        ValueError,
        match=r"q_proj is quantized, and rounding would eat the change; load the adapter onto the",
    ):
        merge(model)
    assert list(model.modules()) == modules
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize(
    "nest", [[LoRA], [HyperAdapt, LoRA], [DoRA]], ids=["LoRA", "hybrid", "DoRA"]
)
def test_saving_and_loading(nest, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    model = adapt(llama(), "all-linear", nest)
    perturb(model)
    for number, axis in enumerate(rank_axes(model).values()):
        axis.resize(range(2 + number % 3))
    save_adapter(model, tmp_path)
    again = load_adapter(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not caplog.records, "the same weights in the same form are the same base"
    plain = load_adapter(llama(quantized=False), tmp_path)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "The base differs from the one this adapter was trained on"
    )
    assert 0 < (logits(plain) - logits(model)).abs().max() < 0.5
    torch.testing.assert_close(
        logits(merge(plain)),
        logits(load_adapter(llama(quantized=False), tmp_path)),
        atol=1e-4,
        rtol=1e-4,
    )


def test_an_adapter_of_the_float_model_loads_onto_the_quantized_one(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    model = adapt(llama(quantized=False), "all-linear", LoRA)
    perturb(model)
    save_adapter(model, tmp_path)
    quantized = load_adapter(llama(), tmp_path)
    assert len(caplog.records) == 1
    with disabled(quantized):
        assert torch.equal(logits(quantized), logits(llama()))


def test_the_fingerprint_does_not_depend_on_whether_the_layer_has_run(quantize):
    def fingerprint(model):
        return describe_adapter(model)["base"]["fingerprint"]

    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    model = adapt(nn.Sequential(quantize(linear)), "all-linear", LoRA)
    before = fingerprint(model)
    model(torch.randn(2, 64))
    assert fingerprint(model) == before
    plain = adapt(nn.Sequential(copy.deepcopy(linear)), "all-linear", LoRA)
    assert fingerprint(plain) != before


def test_a_quantized_projection_is_not_split():
    model = nn.ModuleDict({"c_attn": torchao_int8(nn.Linear(32, 96)), "o": nn.Linear(32, 32)})
    with pytest.raises(
        ValueError, match=r"c_attn is quantized as a whole, .*; say split_fused=False"
    ):
        adapt(model, "all-linear", LoRA, split_fused=True)
    assert not wrapped_layers(model)
    assert list(wrapped_layers(adapt(model, ["o"], LoRA, split_fused=True))) == ["o"]
    with pytest.raises(TypeError, match="cannot be split"):
        layers.Parts(model["c_attn"], ["q", "k", "v"])
