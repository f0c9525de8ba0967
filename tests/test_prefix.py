"""Tests of Prefix beside the common contract."""

import copy
from functools import partial

import pytest
import torch
from test_residual_offset import IDS, llama
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adaptrank import testing
from adaptrank.artifacts import load_adapter, merge, save_adapter
from adaptrank.axes import cost_model
from adaptrank.injection import adapt, delete_adapter, select_rows, set_enabled
from adaptrank.parameterizations import LoRA, Prefix, wrapped_layers


def gpt2():
    torch.manual_seed(0)
    return (
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16))
        .double()
        .eval()
    )


MAKES = pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])


def prefixed(make, **arguments):
    torch.manual_seed(1)
    model = adapt(make(), "all", partial(Prefix, tokens=5, **{"std": 0.5, **arguments}))
    return model


def body(model):
    return next(iter(wrapped_layers(model).values()))


def by_hand(model, prefix, ids, mask=None):
    """Logits of a bare model whose cache is filled by hand, as its documentation has it."""
    cache = DynamicCache(
        [(k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1)) for k, v in prefix]
    )
    mask = torch.ones_like(ids) if mask is None else mask
    longer = torch.cat([mask.new_ones(len(ids), prefix.shape[-2]), mask], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + prefix.shape[-2]
    return model(
        ids, past_key_values=cache, attention_mask=longer, position_ids=positions, use_cache=True
    ).logits


def test_the_contract_with_the_closed_count():
    testing.check_parameterization(Prefix, count=lambda: 2 * 2 * 1 * 8 * 8)


def test_the_contract_with_an_encoder():
    build = testing.builder(Prefix, Prefix.example().double(), tokens=3, encoder=4)
    for check in (
        testing.check_definition,
        testing.check_gradients,
        testing.check_exact_gradients,
        testing.check_training,
        testing.check_state_dict,
        testing.check_copies,
        testing.check_switch,
        testing.check_arguments,
    ):
        check(build)
    testing.check_parameter_count(build, lambda: 3 * 4 + 4 * 5 + 2 * 2 * 1 * 8 * 5)
    testing.check_low_precision(
        testing.builder(Prefix, Prefix.example().to(torch.bfloat16), tokens=3, encoder=4)
    )


@pytest.mark.parametrize(("tokens", "count"), [(10, 286_720 * 2), (30, 860_160 * 2)])
def test_count_of_a_real_model(tokens, count):
    """Llama-3.2-3B: 28 layers, 8 key-value heads of 128, not 24: the prefix has the heads of the
    cache."""
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128,
        )
        layer = Prefix(LlamaModel(config), tokens=tokens)
    assert layer.P.shape == (28, 2, 8, tokens, 128)
    assert cost_model(layer).total({}) == count


@MAKES
def test_it_is_what_a_cache_filled_by_hand_gives(make):
    model = prefixed(make)
    want = by_hand(make(), body(model).prefix(), IDS)
    for _ in range(2):  # a second call begins a new cache
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        model(IDS, attention_mask=torch.ones_like(IDS)).logits, want, rtol=1e-10, atol=1e-10
    )
    positions = torch.arange(6)[None].expand(2, -1)
    torch.testing.assert_close(
        model(IDS, position_ids=positions).logits, want, rtol=1e-10, atol=1e-10
    )
    assert want.shape == (2, 6, 50)
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, want, rtol=1e-10, atol=1e-10)


@MAKES
def test_a_prefix_of_zeros_is_not_the_frozen_model(make):
    """It takes a share of every softmax."""
    model = prefixed(make)
    body(model).P.data.zero_()
    assert (model(IDS).logits - make()(IDS).logits).abs().max() > 1e-3


@MAKES
def test_a_left_padded_row_is_what_it_is_alone(make):
    model = prefixed(make)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    have = model(IDS, attention_mask=mask).logits
    # Llama's rotations and norms are float32 in any model.
    torch.testing.assert_close(have[:1, 2:], model(IDS[:1, 2:]).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(have[1:], model(IDS[1:]).logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        have[:, 2:], by_hand(make(), body(model).prefix(), IDS, mask)[:, 2:], rtol=1e-10, atol=1e-10
    )


@MAKES
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_greedy_search_without_a_cache(make, beams, padded):
    model = prefixed(make)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 1 - int(padded)
    arguments = {
        "max_new_tokens": 4,
        "do_sample": False,
        "num_beams": beams,
        "attention_mask": mask,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    have = model.generate(IDS, **arguments)
    assert torch.equal(model.generate(IDS, use_cache=False, **arguments), have)
    assert torch.equal(model.generate(IDS, **arguments), have)
    if beams == 1:
        # What a step computed, and not only its best token, which small mistakes would leave as it
        # is.
        steps = model.generate(
            IDS, output_logits=True, return_dict_in_generate=True, **arguments
        ).logits
        ids, seen, bare = IDS, mask, make()
        for step in steps:
            logits = by_hand(bare, body(model).prefix(), ids, seen)[:, -1]
            torch.testing.assert_close(step.double(), logits, rtol=1e-5, atol=1e-6)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            seen = torch.cat([seen, seen.new_ones(2, 1)], 1)
        assert torch.equal(have, ids)
        set_enabled(model, False)
        assert torch.equal(model.generate(IDS, **arguments), make().generate(IDS, **arguments))


def test_a_cache_goes_on_with_its_prefix():
    model = prefixed(llama)
    want = model(IDS).logits
    first = model(IDS[:, :4], use_cache=True)
    assert first.past_key_values.get_seq_length() == 5 + 4
    second = model(
        IDS[:, 4:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(IDS)
    )
    torch.testing.assert_close(
        torch.cat([first.logits, second.logits], 1), want, rtol=1e-5, atol=1e-6
    )
    assert model(IDS, use_cache=False).past_key_values is None
    assert len(model.model(IDS, use_cache=False, return_dict=False)) == 1


def test_two_prefixes_stand_in_a_row():
    """A nest of two is one of both lengths, and each can be off."""
    model = adapt(prefixed(llama), "all", partial(Prefix, tokens=3, std=0.5), name="second")
    inner, outer = body(model).nest
    joined = torch.cat([outer.prefix(), inner.prefix()], -2)
    want = by_hand(llama(), joined, IDS)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-10, atol=1e-10)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    arguments = {
        "max_new_tokens": 4,
        "do_sample": False,
        "attention_mask": mask,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    assert torch.equal(
        model.generate(IDS, **arguments), model.generate(IDS, use_cache=False, **arguments)
    )
    set_enabled(model, ["second"])
    torch.testing.assert_close(
        model(IDS).logits, by_hand(llama(), outer.prefix(), IDS), rtol=1e-10, atol=1e-10
    )
    delete_adapter(model, "second")
    set_enabled(model)
    torch.testing.assert_close(
        model(IDS).logits, by_hand(llama(), inner.prefix(), IDS), rtol=1e-10, atol=1e-10
    )


@MAKES
@pytest.mark.parametrize("lora_first", [True, False])
def test_with_lora_inside_it_trains_saves_loads_and_generates(make, lora_first, tmp_path):
    targets = ["q_proj"] if make is llama else ["c_attn"]

    def adapted():
        model = make()
        steps = [(targets, partial(LoRA, rank=2)), ("all", partial(Prefix, tokens=4))]
        for where, method in steps if lora_first else reversed(steps):
            adapt(model, where, method)
        return model

    model = adapted()
    assert len(wrapped_layers(model)) == 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        assert body(model).P.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.eval()
    want, tokens = (
        model(IDS).logits,
        model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0),
    )
    save_adapter(model, tmp_path)
    loaded = load_adapter(make(), tmp_path)
    assert torch.equal(loaded(IDS).logits, want)
    assert torch.equal(
        loaded.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), tokens
    )
    assert torch.equal(
        load_adapter(adapted(), tmp_path)(IDS).logits, want
    )  # into one that is wrapped already
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match="Prefix has no dense form and cannot be merged"):
        merge(model)


def test_wrong_masks_and_caches_are_refused():
    model = prefixed(llama)
    with pytest.raises(
        ValueError, match=r"covers 4 positions, and there are 6 tokens; it must cover the tokens"
    ):
        model(IDS, attention_mask=torch.ones(2, 4).long())
    with pytest.raises(ValueError, match=r"covers 11 positions, and there are 6 tokens"):
        model(IDS, attention_mask=torch.ones(2, 11).long())
    with pytest.raises(ValueError, match="not prepared ones"):
        model(IDS, attention_mask=torch.ones(2, 1, 6, 6).bool())
    cache = llama()(IDS, use_cache=True).past_key_values
    with pytest.raises(
        ValueError,
        match="6 positions that were computed without the prefix; start with an empty one",
    ):
        model(IDS, past_key_values=cache)
    with pytest.raises(
        ValueError, match="fills a DynamicCache, not a StaticCache; leave cache_implementation out"
    ):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")


def test_learned_positions_end():
    model = prefixed(gpt2)
    assert model(torch.zeros(1, 11).long()).logits.shape == (1, 11, 50)
    with pytest.raises(
        ValueError,
        match=r"12 tokens and a prefix of 5 do not fit the 16 learned positions of GPT2Model; "
        r"use at most 11 tokens",
    ):
        model(torch.zeros(1, 12).long())
    assert body(prefixed(llama)).positions is None


def test_gradient_checkpointing_is_refused():
    for make in (llama, gpt2):
        model = prefixed(make).train()
        model.gradient_checkpointing_enable()
        with pytest.raises(
            ValueError,
            match="Prefix needs the cache, which gradient checkpointing drops; train without it",
        ):
            model(IDS)
        model.eval()(IDS)


def test_rows_of_a_batch_are_refused():
    model = prefixed(llama)
    with select_rows(model, ["default", None]), pytest.raises((ValueError, TypeError)):
        model(IDS)


def test_what_it_refuses():
    with pytest.raises(
        TypeError, match="Prefix wraps the body of a causal transformer, not Linear"
    ):
        Prefix(nn.Linear(4, 4))
    assert not Prefix.wraps(llama())  # it has a head
    both_ways = llama().model
    for layer in both_ways.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(
        TypeError, match="Prefix does not fit LlamaModel: its tokens see those after them"
    ):
        Prefix(both_ways)
    bert = BertModel(
        BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32)
    )
    with pytest.raises(ValueError, match="No layer matches targets='all'"):
        adapt(bert, "all", Prefix)
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=30)
    )
    with pytest.raises(
        TypeError, match="encoder-decoders keep two caches; use a decoder-only model"
    ):
        adapt(t5, "all", Prefix)
    window = MistralForCausalLM(
        MistralConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=30,
        )
    )
    with pytest.raises(
        TypeError,
        match="a window or a state rather than all keys and values; use a model with full "
        "attention",
    ):
        adapt(window, "all", Prefix)
    with pytest.raises(ValueError, match="tokens=0: a prefix has at least one token"):
        Prefix(Prefix.example(), tokens=0)
    model = prefixed(gpt2)
    with pytest.raises(ValueError, match="does not go with cross-attention"):
        model(IDS, encoder_hidden_states=torch.zeros(2, 3, 32).double())


def test_copies_have_prefixes_of_their_own():
    model = prefixed(llama)
    twin = copy.deepcopy(model)
    testing.perturb(twin)
    assert torch.equal(twin(IDS).logits, twin(IDS).logits)
    assert not torch.equal(twin(IDS).logits, model(IDS).logits)
