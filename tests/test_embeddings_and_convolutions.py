"""Embeddings and convolutions, from `adapt` to a merged model and back."""

import logging
from functools import partial

import pytest
import torch
from conftest import METHODS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import adapt, describe, load_adapter, merge, rank_axes, save_adapter, unmerge
from adaptrank.axes import cost_model, generator
from adaptrank.injection import set_enabled
from adaptrank.parameterizations import SVD, DoRA, HyperAdapt, LoRA, wrapped_layers
from adaptrank.testing import merges, perturb


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).double().eval()


class Net(nn.Module):
    """Tokens of a grid, convolutions of several kinds, one that no method wraps, a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(48, 24)
        self.first = nn.Conv2d(24, 48, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(48, 48, 3, padding="same", groups=48)
        self.last = nn.Conv2d(
            48, 24, (2, 1), dilation=2, padding=1, padding_mode="circular", bias=False
        )
        self.norm, self.head = nn.GroupNorm(2, 24), nn.Linear(24, 24)

    def forward(self, ids):
        x = self.tokens(ids).movedim(-1, 1)
        x = self.depthwise(torch.relu(self.first(x)))
        return self.head(torch.relu(self.norm(self.last(x))).mean((2, 3)))


def net():
    return Net().double()


GRID = torch.arange(3 * 8 * 8).reshape(3, 8, 8) % 48
IDS = torch.arange(1, 13).reshape(2, 6)
CASES = {
    "embed_tokens": (llama, ["embed_tokens"], ["model.embed_tokens"]),
    "convolutions": (net, ["first", "last"], ["first", "last"]),
    "all of a network": (net, "all", ["tokens", "first", "last", "head"]),
}
METHODS_OF_ALL = [
    cls
    for cls in METHODS
    if all(cls.wraps(layer) for layer in (nn.Embedding(4, 4), nn.Conv2d(4, 4, 1)))
]


@torch.no_grad()
def output(model):
    return model(GRID) if isinstance(model, Net) else model(IDS).logits


def loss(model):
    return model(GRID).square().mean() if isinstance(model, Net) else model(IDS, labels=IDS).loss


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


@pytest.fixture(
    params=[*METHODS_OF_ALL, [HyperAdapt, partial(LoRA, rank=2)]],
    ids=lambda m: getattr(m, "__name__", "hybrid"),
)
def nest(request):
    return request.param


def close(have, want):
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)


def test_from_adapt_to_merged_and_back(case, nest, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    make, targets, found = case
    model = make()
    want = output(model)
    adapt(model, targets, nest)
    if targets == "all":
        (record,) = caplog.records
        assert "a convolution in 48 groups is no single matrix" in record.getMessage()
        caplog.clear()
    layers = wrapped_layers(model)
    assert list(layers) == found
    if all(w.starts_at_base for layer in layers.values() for w in layer.nest):
        assert torch.equal(output(model), want)
    assert all(path.rsplit(".", 1)[-1] in describe(model) for path in found)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    first = loss(model)
    first.backward()
    frozen = [p for layer in layers.values() for p in layer.innermost.parameters()]
    assert all(p.grad is None for p in frozen)
    optimizer.step()
    assert loss(model) < first

    perturb(model)
    for number, (key, axis) in enumerate(rank_axes(model).items()):
        axis.resize(range(max(1, len(axis) - 1 - number % 2)), 0, generator(0, key, 0))
    save_adapter(model, tmp_path)
    want = output(model)
    again = load_adapter(make(), tmp_path)
    assert torch.equal(output(again), want)
    assert not caplog.records
    if not all(merges(layer) for layer in layers.values()):
        return
    state = {k: v.clone() for k, v in model.state_dict().items()}
    merge(model, keep_originals=True)
    assert list(model.state_dict()) == list(make().state_dict())
    close(output(model), want)
    unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(output(model), want)


def test_resizing_keeps_what_is_computed(case, nest):
    """Growing changes nothing, and what is pruned again is what was grown; the same with moments of
    an optimizer."""
    make, targets, _ = case
    model = adapt(make(), targets, nest)
    perturb(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss(model).backward()
    optimizer.step()
    want = output(model)
    for key, axis in rank_axes(model).items():
        size, room = len(axis), axis.limits()[1]
        if "grow" not in axis.capabilities or (room is not None and room < size + 2):
            continue
        axis.resize(None, 2, generator(0, key, 0), [optimizer])
        assert len(axis) == size + 2
        close(output(model), want)
        axis.resize(range(size), optimizers=[optimizer])
        close(output(model), want)
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()
    sizes = {key: len(axis) for key, axis in rank_axes(model).items()}
    assert cost_model(model).total(sizes) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_closing_every_unit_is_the_base():
    for make, targets, _ in CASES.values():
        model = adapt(make(), targets, LoRA)
        perturb(model)
        for axis in rank_axes(model).values():
            axis.close(range(len(axis)))
        close(output(model), output(make()))


# ---- what "all" means


def test_all_is_what_the_whole_nest_wraps_and_can():
    assert list(wrapped_layers(adapt(net(), "all", [SVD, LoRA]))) == ["head"]
    assert list(wrapped_layers(adapt(net(), "all", [LoRA, HyperAdapt]))) == [
        "tokens",
        "first",
        "last",
        "head",
    ]
    assert list(wrapped_layers(adapt(net(), "all-linear", LoRA))) == ["head"]
    assert "lm_head" not in wrapped_layers(adapt(llama(), "all", LoRA))
    with pytest.raises(
        TypeError,
        match=r"depthwise: LoRA: a convolution in 48 groups is no single matrix; leave it out",
    ):
        adapt(net(), ["depthwise"], LoRA)
    with pytest.raises(TypeError, match=r"first: SVD wraps Linear or Conv1D, not Conv2d"):
        adapt(net(), ["first"], SVD)


def test_a_network_of_convolutions_without_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert list(wrapped_layers(adapt(model, "all", LoRA))) == ["0", "2"]


# ---- tied embeddings


@pytest.mark.parametrize("nest", [LoRA, HyperAdapt, DoRA, [HyperAdapt, LoRA]], ids=str)
def test_tied_embeddings_train_and_are_not_merged(nest, tmp_path):
    model = adapt(llama(tied=True), ["embed_tokens"], nest)
    want = output(llama(tied=True))
    assert torch.equal(output(model), want)
    assert model.lm_head.weight is model.model.embed_tokens.innermost.weight
    first = loss(model)
    first.backward()
    assert model.lm_head.weight.grad is None
    perturb(model)
    changed = output(model)
    assert not torch.allclose(changed, want)
    close(changed, model.lm_head(model.model(IDS).last_hidden_state))
    modules = list(model.modules())
    with pytest.raises(
        ValueError,
        match=r"model\.embed_tokens shares its weight with lm_head, which merging would change too",
    ):
        merge(model)
    assert list(model.modules()) == modules
    assert torch.equal(output(model), changed)
    set_enabled(model, False)
    assert torch.equal(output(model), want)
    set_enabled(model, True)
    save_adapter(model, tmp_path)
    assert torch.equal(output(load_adapter(llama(tied=True), tmp_path)), changed)


def test_generating_over_a_wrapped_embedding():
    model = adapt(llama(tied=True), ["embed_tokens"], LoRA)
    perturb(model)
    have = model.generate(IDS, max_new_tokens=4, do_sample=False)
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, output_of(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(have, ids)


@torch.no_grad()
def output_of(model, ids):
    return model(ids).logits
