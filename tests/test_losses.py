"""The loss without logits, against the cross entropy of all logits, and the models that fit."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from transformers import Cohere2Config, LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from adaptrank.modules.body_and_head import separable_body
from adaptrank.ops import cross_entropy as losses


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_of_a_head_in_chunks_is_the_cross_entropy_of_its_logits(bias, monkeypatch):
    h, W, b = draw(7, 5), draw(11, 5, grad=False), draw(11, grad=False) if bias else None
    targets = torch.randint(11, (7,))
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 3 * 11 * 8)  # three tokens at a time
    function = lambda h: losses.linear_cross_entropy(h, W, b, targets)  # noqa: E731
    torch.testing.assert_close(
        function(h), losses.plain_cross_entropy(h, W, b, targets), rtol=1e-12, atol=1e-12
    )
    assert gradcheck(function, h)
    assert gradgradcheck(function, h)


def test_no_logits_of_all_tokens_are_held(monkeypatch):
    seen = []
    plain = torch.log_softmax
    monkeypatch.setattr(
        torch, "log_softmax", lambda x, *args, **kw: seen.append(len(x)) or plain(x, *args, **kw)
    )
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 10 * 64 * 4)
    h = torch.randn(35, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses.linear_cross_entropy(h, torch.randn(64, 8), None, torch.randint(64, (35,)))
    assert seen == [10, 10, 10, 5]
    assert not [t for t in kept if t.shape == (35, 64)]


def llama(**more):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, vocab_size=64, **more)
    ).requires_grad_(False)


def test_a_model_whose_logits_are_more_than_its_head_keeps_them():
    assert separable_body(llama()) is not None
    scaled = Cohere2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        logit_scale=0.5,
    )
    assert separable_body(AutoModelForCausalLM.from_config(scaled).requires_grad_(False)) is None
    trained = llama()
    trained.lm_head.weight.requires_grad_(True)
    assert separable_body(trained) is None
    model = llama()
    separable_body(model)
    assert "forward" not in vars(model.model)  # the body is itself again
