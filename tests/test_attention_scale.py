"""Tests of AttentionScale beside the common contract."""

import copy
from functools import partial

import pytest
import torch
from test_residual_offset import IDS, llama
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)

from adaptrank import testing
from adaptrank.artifacts import load_adapter, merge, save_adapter, unmerge
from adaptrank.axes import cost_model
from adaptrank.injection import adapt
from adaptrank.parameterizations import AttentionScale, LoRA, wrapped_layers

FORMS = {"scalar": {}, "lite": {"form": "lite", "tokens": 4}, "full": {"form": "full", "tokens": 4}}


def vit(**changes):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        **changes,
    )
    return ViTModel(config, add_pooling_layer=False).double().eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(layer, q, k, v, mask=None, causal=False):
    """softmax(alpha * Z + mask) V, the formula."""
    logits = (1 + layer.da) * (q @ k.mT / q.shape[-1] ** 0.5)
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    return logits.softmax(-1) @ v


def test_the_contract_with_the_closed_count():
    testing.check_parameterization(AttentionScale, count=lambda: 3)


@pytest.mark.parametrize(("form", "count"), [("lite", 16), ("full", 48)])
def test_the_contract_of_the_other_forms(form, count):
    base = AttentionScale.example().double()
    build = testing.builder(AttentionScale, base, **FORMS[form])
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
    testing.check_parameter_count(build, lambda: count)
    testing.check_low_precision(
        testing.builder(AttentionScale, copy.deepcopy(base).to(torch.bfloat16), **FORMS[form])
    )
    layer = build()
    assert not layer.mergeable
    x = testing.normal_input(layer, (2,))
    torch.testing.assert_close(
        testing.output(layer, x), testing.output(layer.base, x), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
def test_the_formula_and_masks(form, kind):
    """Every mask, on a BERT attention whose projections are computed here."""
    layer = AttentionScale(AttentionScale.example().double(), **FORMS[form])
    plain = layer.innermost
    plain.is_causal = kind == "causal"
    testing.perturb(layer, 0.5)
    with torch.no_grad():
        layer.da[
            0, 0, 0
        ] = -1.5  # a factor below zero: on minus infinity it would open what is masked
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    q, k, v = (
        getattr(plain, name)(x).view(2, 4, 3, 8).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    mask = None
    if kind in ("bool", "float"):
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()[:, None, None].expand(2, 1, 4, 4)
        mask = (
            mask
            if kind == "bool"
            else torch.zeros(2, 1, 4, 4).double().masked_fill(~mask, -torch.inf)
        )
    have = layer(x, attention_mask=mask)[0]
    want = by_hand(layer, q, k, v, mask, kind == "causal").transpose(1, 2).flatten(2)
    assert have.isfinite().all()
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["lite", "full"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float32])
def test_a_row_that_is_masked_whole_is_finite(form, dtype):
    layer = AttentionScale(
        AttentionScale.example().to(torch.float32 if dtype == torch.bool else dtype), **FORMS[form]
    )
    x = torch.randn(1, 4, 24).to(layer.innermost.query.weight.dtype).requires_grad_()
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    if dtype != torch.bool:
        mask = torch.full((1, 1, 4, 4), -torch.inf, dtype=dtype)
    y = layer(x, attention_mask=mask)[0]
    y.sum().backward()
    assert all(tensor.isfinite().all() for tensor in (y, x.grad, layer.da.grad))


def test_counts_of_a_vit():
    """12 blocks of 197 tokens, 6 heads: the numbers of the closed formulas, h L, n^2 L and h n^2
    L."""
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    for arguments, count in (
        ({}, 72),
        ({"form": "lite", "tokens": 197}, 465_708),
        ({"form": "full", "tokens": 197}, 2_794_248),
    ):
        with torch.device("meta"):
            model = ViTModel(config, add_pooling_layer=False)
        adapt(model, "all", partial(AttentionScale, **arguments))
        assert cost_model(model).total({}) == count


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("bias", [True, False])
def test_scalar_merges_exactly_also_where_queries_are_rotated(implementation, bias):
    model = llama(attention_bias=bias, attn_implementation=implementation)
    if bias:
        testing.perturb(model)
    model.requires_grad_(False)
    plain = model(IDS).logits
    adapt(model, "all", AttentionScale)
    assert list(wrapped_layers(model)) == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert torch.equal(model(IDS).logits, plain)
    testing.perturb(model, 0.3)
    want, state = model(IDS).logits, {n: p.clone() for n, p in model.state_dict().items()}
    assert not torch.allclose(want, plain)
    merge(model, keep_originals=True)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-10, atol=1e-10)
    unmerge(model)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())


def test_padding_in_a_model():
    """The left-padded row computes what it computes alone, in all three forms."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for arguments in ({}, {"form": "lite", "tokens": 6}, {"form": "full", "tokens": 6}):
        model = adapt(llama(), "all", partial(AttentionScale, **arguments))
        testing.perturb(model, 0.3)
        full = model(IDS, attention_mask=mask).logits
        other = IDS.clone()
        other[0, :2] = 7
        torch.testing.assert_close(
            model(other, attention_mask=mask).logits[0, 2:], full[0, 2:], rtol=1e-10, atol=1e-10
        )
        assert full.isfinite().all()


def test_with_lora_inside_it_saves_loads_merges_and_generates(tmp_path):
    model = adapt(llama(), ["q_proj", "k_proj"], LoRA)
    adapt(model, "all", AttentionScale, name="scale")
    testing.perturb(model, 0.1)
    want = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(llama(), tmp_path)(IDS).logits, want)
    with pytest.raises(
        ValueError, match="folds into q_proj, which still carries LoRA; merge the whole model"
    ):
        model.model.layers[0].self_attn.merged()
    state = {n: p.clone() for n, p in model.state_dict().items()}
    merge(model, keep_originals=True)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
    unmerge(model)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    adapt(adapt(llama(), "all", AttentionScale), ["q_proj"], LoRA)  # the other order


def test_checkpointed_layers_have_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        model = adapt(llama().train(), "all", AttentionScale)
        testing.perturb(model, 0.3)
        if checkpointed:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_where_queries_cannot_be_reached_it_does_not_merge():
    torch.manual_seed(0)
    fused = (
        GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=3, vocab_size=50)).double().eval()
    )
    normed = (
        Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=3,
                num_key_value_heads=1,
                head_dim=8,
                vocab_size=50,
            )
        )
        .double()
        .eval()
    )
    for model in (fused, normed):
        want = model(IDS).logits
        adapt(model, "all", AttentionScale)
        assert torch.equal(model(IDS).logits, want)
        testing.perturb(model, 0.3)
        assert not torch.allclose(model(IDS).logits, want)
        with pytest.raises(
            ValueError, match="AttentionScale has no dense form and cannot be merged"
        ):
            merge(model)


def test_lite_and_full_hold_one_number_of_tokens():
    model = adapt(vit(), "all", partial(AttentionScale, form="full", tokens=5))
    want = vit()(IMAGES).last_hidden_state
    torch.testing.assert_close(model(IMAGES).last_hidden_state, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(
        ValueError,
        match=r"holds 5x5 pairs of positions, and this attention has 10x10; use form='scalar'",
    ):
        model(torch.randn(1, 3, 48, 48, dtype=torch.float64), interpolate_pos_encoding=True)
    # The error did not leave a route behind.
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_nests_multiply_whatever_their_forms():
    for forms in (("scalar", "scalar"), ("scalar", "full"), ("lite", "scalar"), ("lite", "full")):
        base = AttentionScale.example().double()
        layer = AttentionScale(AttentionScale(base, **FORMS[forms[0]]), **FORMS[forms[1]])
        testing.perturb(layer, 0.3)
        x = testing.normal_input(layer, (2,))
        q, k, v = (
            getattr(base, name)(x).view(2, 4, 3, 8).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        factor = (1 + layer.da) * (1 + layer.base.da)
        want = (factor * (q @ k.mT / 8**0.5)).softmax(-1) @ v
        torch.testing.assert_close(
            layer(x)[0], want.transpose(1, 2).flatten(2), rtol=1e-10, atol=1e-10
        )


def test_what_it_refuses():
    attention = AttentionScale.example()
    with pytest.raises(
        TypeError, match="AttentionScale wraps attention modules of transformers, not Linear"
    ):
        AttentionScale(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"form='lite', tokens=None\): say tokens=197"):
        AttentionScale(attention, form="lite")
    with pytest.raises(ValueError, match=r"form='scalar', tokens=5\): leave tokens out"):
        AttentionScale(attention, tokens=5)
    with pytest.raises(ValueError, match="form='rank1' is none"):
        AttentionScale(attention, form="rank1")
    layer = AttentionScale(attention, **FORMS["lite"])
    with pytest.raises(ValueError, match="knows no mask of shape"):
        layer(torch.randn(1, 4, 24), attention_mask=torch.ones(1, 4))
    bert = BertModel(
        BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32)
    )
    assert list(wrapped_layers(adapt(bert, "all", AttentionScale))) == [
        "encoder.layer.0.attention.self"
    ]
