"""The key `gradient_checkpointing`: the same gradients, with less memory."""

from functools import partial

import pytest
import torch
from loading_runs import causal, fit, trained
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import adapt
from adaptrank.modules.gradient_checkpointing import enable_checkpointing, read_checkpointing
from adaptrank.parameterizations import LoRA, Prefix
from adaptrank.testing import perturb

IDS = torch.arange(3, 19).reshape(2, 8)
FORMS = [True, {"every_n_layers": 2}, {"use_reentrant": True}, {"offload": True}]


def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32, attention_dropout=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def gradients(model):
    torch.manual_seed(1)
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_the_same_to_the_bit_with_dropout(linear_method):
    check_gradients(linear_method, True)


@pytest.mark.parametrize("given", FORMS[1:], ids=str)
def test_gradients_are_the_same_in_each_form(given):
    check_gradients(partial(LoRA, rank=2, dropout=0.2), given)


def check_gradients(method, given):
    both = []
    for checkpoints in (False, given):
        model = adapt(small(), ["q_proj", "down_proj"], method)
        perturb(model)
        options = read_checkpointing(checkpoints)
        if options is not None:
            enable_checkpointing(model, options)
        both.append(gradients(model))
    plain, recomputed = both
    assert plain.keys() == recomputed.keys()
    for name, want in plain.items():
        assert (want is None) == (recomputed[name] is None), name
        assert want is None or torch.equal(recomputed[name], want), name


@pytest.mark.parametrize("given", [True, {"use_reentrant": True}], ids=str)
def test_a_run_ends_with_the_same_weights(given, tiny_llama):
    ends = []
    for checkpoints in (False, given):
        nest = partial(LoRA, rank=2, dropout=0.3)
        module = causal(tiny_llama, nest, gradient_checkpointing=checkpoints, padding_free=False)
        torch.manual_seed(3)
        fit(module, max_steps=3)
        ends.append(trained(module))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_activations_are_recomputed(tiny_llama):
    module = causal(tiny_llama, gradient_checkpointing={"every_n_layers": 2})
    module.configure_model()
    blocks = module.model.model.layers
    assert [block.gradient_checkpointing for block in blocks] == [True, False]
    calls = []
    for number, block in enumerate(blocks):
        block.self_attn.register_forward_hook(lambda *args, number=number: calls.append(number))
    module.train()
    module.model(IDS, labels=IDS).loss.backward()
    assert sorted(calls) == [0, 0, 1]


def test_a_method_that_needs_the_cache_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"Prefix needs the cache.*Leave model.gradient_checkp"):
        causal("no/such-model", Prefix, gradient_checkpointing=True)


def test_a_model_that_does_not_support_it_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not support gradient"):
        causal(tiny_llama, gradient_checkpointing=True).configure_model()
