"""A batch as one row of its tokens, against the same batch with its padding."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

from adaptrank import PARAMETERIZATIONS, adapt, select_rows, testing
from adaptrank.modules import Adapter, CausalLM, padding_free
from adaptrank.parameterizations import AttentionScale, LoRA, Prefix, adapter_parameters, wrappers

IDS = torch.arange(4 * 9).view(4, 9) % 20 + 3
MASK = torch.arange(9) < torch.tensor([5, 9, 1, 0])[:, None]


def tiny(model_type, **more):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type)
    known = {key: value for key, value in sizes.items() if hasattr(config, key)} | more
    if model_type == "gpt2":
        known = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **known))
        .double()
        .requires_grad_(False)
    )
    if "moe" in model_type or model_type == "mixtral":
        model.set_experts_implementation("eager")  # the grouped one knows no float64
    for parameter in model.parameters():  # so that everything matters: positions, attention, biases
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def both(model, change):
    """Hidden states of the tokens and gradients of the adapters, padded and not."""
    found = []
    for states in (
        lambda body: padding_free.hidden_states(body, IDS, MASK),
        lambda body: body(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state[MASK],
    ):
        model.zero_grad()
        hidden = states(model.base_model)
        (hidden * change).sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in adapter_parameters(model))])
    return found


@pytest.mark.parametrize("model_type", sorted(padding_free.MODEL_TYPES))
def test_a_row_of_examples_has_the_hidden_states_and_gradients_of_the_padded_batch(model_type):
    model = tiny(model_type)
    adapt(model, "all-linear", partial(LoRA, rank=2))
    for wrapper in wrappers(model):
        testing.perturb(wrapper, 0.3)
    assert padding_free.fits(model.base_model, MASK)
    before = model.config._attn_implementation
    ours, padded = both(model, torch.randn(int(MASK.sum()), 32, dtype=torch.float64))
    assert model.config._attn_implementation == before
    for have, want in zip(ours, padded, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-10)


def test_what_does_not_fit_is_given_its_padding():
    def fits(model):
        return padding_free.fits(model.base_model, MASK)

    assert fits(tiny("llama"))
    assert not padding_free.fits(
        tiny("llama").base_model, torch.ones(2, 3, dtype=torch.bool)
    )  # has no padding
    for tokens, short, worth in ((9, 1, False), (9, 6, True), (90, 1, True), (90, 0, False)):
        mask = torch.arange(tokens) < torch.tensor([tokens, tokens - short])[:, None]
        assert padding_free.fits(tiny("llama").base_model, mask) is worth
    assert not padding_free.fits(
        tiny("llama").base_model, MASK.flip(1)
    )  # positions of padding count there
    assert not fits(tiny("mistral", sliding_window=4))
    assert fits(tiny("mistral", sliding_window=16))
    for targets, method in (("all", Prefix), ("all-attention", AttentionScale)):
        model = tiny("llama")
        adapt(model, "model" if targets == "all" else r".*self_attn", method)
        assert not fits(model)
    model = tiny("llama")
    model.set_attn_implementation("eager")
    assert not fits(model)
    model = tiny("llama")
    model.gradient_checkpointing_enable()
    assert not fits(model.train())
    assert not fits(tiny("bloom"))
    assert fits(tiny("llama", attention_dropout=0.1))  # in evaluation nothing is dropped
    assert not fits(tiny("llama", attention_dropout=0.1).train())
    model = adapt(tiny("llama"), "all-linear", partial(LoRA, rank=2))
    assert fits(model)
    with select_rows(model, ["default", None, None, "default"]):
        assert not fits(model)


def drops():
    built = {
        name: cls
        for name, cls in PARAMETERIZATIONS.items()
        if cls.__module__.startswith("adaptrank.")
    }
    return [
        n
        for n, c in built.items()
        if "dropout" in inspect.signature(c).parameters and c.wraps(nn.Linear(32, 32))
    ]


@pytest.mark.parametrize("method", drops())
def test_dropouts_draw_what_they_draw_for_the_padded_batch(method):
    model = tiny("llama").train()
    some = {"rank": 4, "factor": 4} if method == "LoKr" else {"rank": 4}
    known = inspect.signature(PARAMETERIZATIONS[method]).parameters
    given = {key: value for key, value in some.items() if key in known}
    adapt(model, ["q_proj", "down_proj"], partial(PARAMETERIZATIONS[method], dropout=0.4, **given))
    for wrapper in wrappers(model):
        testing.perturb(wrapper, 0.3)
    assert padding_free.fits(model.base_model, MASK)
    torch.manual_seed(1)
    ours = padding_free.hidden_states(model.base_model, IDS, MASK)
    torch.manual_seed(1)
    padded = model.base_model(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state[MASK]
    torch.testing.assert_close(ours, padded, rtol=1e-8, atol=1e-10)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("masked_label", [False, True])
def test_a_training_step_has_the_loss_of_the_padded_batch(tiny_llama, masked_label, monkeypatch):
    torch.manual_seed(0)
    module = CausalLM(tiny_llama, [Adapter([partial(LoRA, rank=4)])], dtype="fp32")
    module.configure_model()
    labels = torch.where(MASK & (torch.arange(9) > 1), IDS, -100)
    if masked_label:
        labels[0, 6] = 5  # nobody should, but it is a label, and padding is what predicts it
    rows = []
    plain = padding_free.hidden_states
    monkeypatch.setattr(padding_free, "hidden_states", lambda *args: rows.append(1) or plain(*args))
    found = []
    for module.padding_free in (True, False):
        losses, row = module.train()(IDS, MASK.long(), labels)
        found.append((losses, row))
    assert len(rows) == (0 if masked_label else 1)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    module.eval()(IDS, MASK.long(), labels)
    with torch.no_grad():
        module.train()(IDS, MASK.long(), labels)
    assert len(rows) == (0 if masked_label else 1)
