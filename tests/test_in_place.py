"""A model may write into the output of an adapted layer, with every method and on every path."""

import copy

import pytest
import torch
import transformers
from conftest import LINEAR_METHODS, METHODS
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptrank import adapt
from adaptrank.ops import low_rank
from adaptrank.parameterizations import HyperAdapt, LoRA, wrapped_layers
from adaptrank.testing import perturb

BASES = {
    "linear": lambda: (nn.Linear(48, 24), torch.randn(2, 6, 48)),
    "bare": lambda: (nn.Linear(48, 24, bias=False), torch.randn(5, 48)),
    "conv1d": lambda: (Conv1D(24, 48), torch.randn(2, 6, 48)),
    "half": lambda: (nn.Linear(48, 24).bfloat16(), torch.randn(2, 6, 48).bfloat16()),
    "embedding": lambda: (nn.Embedding(48, 24), torch.randint(48, (2, 6))),
    "convolution": lambda: (nn.Conv2d(6, 24, (2, 4)), torch.randn(2, 6, 5, 7)),
}
NESTS = {cls.__name__: [cls] for cls in METHODS}
NESTS |= {"LoRA on HyperAdapt": [HyperAdapt, LoRA], "HyperAdapt on LoRA": [LoRA, HyperAdapt]}


def out_of_place(y):
    y = y / 3
    return torch.cat([y[:1] * 2, y[1:]]).clamp(min=-0.1)


def in_place(y):
    y /= 3
    y[:1] *= 2
    return y.clamp_(min=-0.1)


def run(layer, x, follow):
    layer.zero_grad()
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(1)
    y = follow(layer(x))
    y.square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("nest", NESTS)
def test_an_output_may_be_overwritten(nest, base, fast, monkeypatch):
    layer, x = BASES[base]()
    if not all(cls.wraps(layer) for cls in NESTS[nest]):
        pytest.skip("not a layer of this method")
    if not fast:
        monkeypatch.setattr(low_rank, "fits", lambda x: False)
    for cls in NESTS[nest]:
        layer = cls(layer)
    perturb(layer, 0.1)
    want, have = run(layer, x, out_of_place), run(layer, x, in_place)
    for name, value in want.items():
        torch.testing.assert_close(have[name], value, rtol=1e-5, atol=1e-5, msg=name)


def led():
    config = transformers.LEDConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        pad_token_id=0,
        decoder_start_token_id=2,
    )
    return transformers.LEDForConditionalGeneration(config)


def longformer():
    config = transformers.LongformerConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        attention_window=4,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    return transformers.LongformerForMaskedLM(config)


def rwkv():
    config = transformers.RwkvConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        intermediate_size=48,
        context_length=32,
    )
    return transformers.RwkvForCausalLM(config)


IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.mark.parametrize("make", [led, longformer, rwkv], ids=lambda make: make.__name__)
def test_models_that_write_into_activations_train(make):
    torch.manual_seed(0)
    base = make()
    for method in LINEAR_METHODS:
        model = adapt(copy.deepcopy(base), "all-linear", method).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for path, layer in wrapped_layers(model).items():
            grads = [p.grad for w in layer.nest for _, p in w.own_parameters()]
            assert any(g is not None for g in grads) or "global" in path, (method, path)
