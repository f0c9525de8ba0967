"""What users of other adapter libraries rely on, for every method of the folder on every kind of small model it fits.

The invariants are those that HF PEFT holds each of its methods to. Nothing here names a method: which layers it wraps is asked
of the class, and a pair of which it wraps nothing is no pair.
"""

import copy
import functools
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import transformers
from conftest import METHODS
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from adaptrank import (
    adapt,
    delete_adapter,
    disabled,
    layers,
    load_adapter,
    merge,
    save_adapter,
    select_rows,
    set_enabled,
    unmerge,
)
from adaptrank.axes import generator, rank_axes
from adaptrank.parameterizations.base import adapter_parameters, named_layers, wrapped_layers, wrappers
from adaptrank.testing import perturb

# ---- models


class MLP(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=i % 2 == 0) for i, (n, m) in enumerate(zip(widths, widths[1:])))  # noqa: B905, RUF007
        self.norm = nn.LayerNorm(widths[1])

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x if number != 1 else self.norm(torch.tanh(x)))
        return x


class EmbeddingConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(48, 32), Conv1D(48, 32), nn.Linear(48, 16)

    def forward(self, ids):
        return self.head(torch.tanh(self.conv(self.embed(ids))))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 2, stride=2, bias=False)
        self.head = nn.Linear(64, 16)

    def forward(self, x):
        return self.head(self.two(torch.tanh(self.one(x))).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def encoder():
    """torch's own layer: its attention reads the weight of `out_proj` rather than calling it."""
    return nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True), nn.Linear(32, 16))


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=16,
        max_position_embeddings=32, type_vocab_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def numbers(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tokens(*size):
    return torch.randint(1, 48, size, generator=torch.Generator().manual_seed(0))


MODELS = {
    "mlp": (lambda: MLP(16, 32, 16), numbers(3, 16)),
    "deep_mlp": (lambda: MLP(16, 24, 24, 24, 24, 24, 16), numbers(3, 16)),
    "embedding_conv1d": (EmbeddingConv1D, tokens(3, 5)),
    "conv2d": (ConvNet, numbers(3, 16, 4, 4)),
    "attention": (Attention, numbers(3, 5, 32)),
    "encoder": (encoder, numbers(3, 5, 32)),
    "llama": (llama, {"input_ids": tokens(3, 7)}),
    "gpt2": (gpt2, {"input_ids": tokens(3, 7)}),
    "bert": (bert, {"input_ids": tokens(3, 7)}),
    "t5": (t5, {"input_ids": tokens(3, 7), "decoder_input_ids": tokens(3, 4)}),
    "vit": (vit, {"pixel_values": numbers(3, 3, 16, 16)}),
}
"""Name -> how to build it, and a batch of three rows."""
TRANSFORMERS = ("llama", "gpt2", "bert", "t5", "vit")
GENERATE = ("llama", "gpt2", "t5")
UNUSED = {"t5": ["shared"]}
"""A module that the model holds and never calls."""
NO_ROWS = {"gpt2": ["wpe"], "bert": ["position_embeddings"], "t5": ["relative_attention_bias"]}
"""Layers that compute once for the whole batch; rows cannot be selected there."""


@functools.cache
def plain(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model as nobody has touched it; never changed, only copied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name][0]().to(dtype).eval()


def frozen_dtype(model):
    own = {id(p) for p in adapter_parameters(model)}
    return next(p.dtype for p in model.parameters() if id(p) not in own)


def run(model: nn.Module, name: str) -> torch.Tensor:
    """What the model says of its batch."""
    batch, dtype = MODELS[name][1], frozen_dtype(model)
    if isinstance(batch, dict):
        return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}).logits
    return model(batch.to(dtype) if batch.is_floating_point() else batch)


def output(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return run(model, name)


def loss(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().mean()


@functools.cache
def misfits(method, name: str) -> tuple[str, ...] | None:
    """Paths of layers that the method wraps in general, but not of their size or kind; None where nothing is left."""
    wrapped = [path for path, layer in named_layers(plain(name)).items() if path and method.wraps(layer)]
    out = []
    for path in wrapped:
        try:
            if path in UNUSED.get(name, ()):
                raise ValueError(path)
            method(copy.deepcopy(plain(name).get_submodule(path)))
        except (TypeError, ValueError):
            out.append(path)
    return tuple(out) if len(out) < len(wrapped) else None


def adapted(method, name, *, dtype=torch.float64, seed=1, adapter="default", into=None, exclude=()):
    """The model, or a given one, with every layer that fits in the method's hands."""
    model = copy.deepcopy(plain(name, dtype)) if into is None else into
    torch.manual_seed(seed)
    return adapt(model, "all", method, exclude=[*misfits(method, name), *exclude], name=adapter)


def perturbed(method, name, seed=1, **arguments):
    """Away from the start, where most mistakes cannot be seen."""
    model = adapted(method, name, seed=seed, **arguments)
    perturb(model, 0.05, seed)
    return model


def own_tensors(model):
    """Everything that wrappers add to the state of a model: name in it -> tensor."""
    where = {id(module): path for path, module in model.named_modules()}
    return {
        f"{where[id(w)]}.{key}": tensor
        for w in wrappers(model)
        for key, tensor in w.state_dict(keep_vars=True).items()
        if not key.startswith("base.")
    }


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(have, want):
    return have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)


def looks_like(model, name):
    """Whether the model is, module for module and tensor for tensor, what it was before it was adapted."""
    base = plain(name, frozen_dtype(model))
    kinds = [[(path, type(m)) for path, m in one.named_modules()] for one in (model, base)]
    return kinds[0] == kinds[1] and list(model.state_dict()) == list(base.state_dict())


PAIRS = [(method, name) for method in METHODS for name in MODELS if misfits(method, name) is not None]


def pairs(test: Callable | None = None, names=tuple(MODELS)):
    chosen = [pytest.param(m, n, id=f"{m.__name__}-{n}") for m, n in PAIRS if n in names]
    mark = pytest.mark.parametrize(("method", "name"), chosen)
    return mark if test is None else mark(test)


def test_every_method_fits_a_model():
    assert {method for method, _ in PAIRS} == set(METHODS)


# ---- start, training


@pairs
def test_only_the_adapter_trains_and_all_of_it(method, name):
    model = adapted(method, name, dtype=torch.float32)
    want, have = output(plain(name, torch.float32), name), output(model, name)
    assert torch.equal(have, want) == method.starts_at_base
    trains = {id(p) for p in adapter_parameters(model)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trains
    before = snapshot(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss(run(model, name)).backward()
        optimizer.step()
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[key]) != (id(tensor) in trains), key
        assert id(tensor) in trains or tensor.grad is None, key


@pairs
def test_the_adapters_tensors_and_no_others_are_new(method, name, tmp_path):
    model = adapted(method, name)
    new, base = own_tensors(model), plain(name).state_dict()
    rest = {key: tensor for key, tensor in model.state_dict().items() if key not in new}
    assert new
    assert sum(t.numel() for t in rest.values()) == sum(t.numel() for t in base.values())
    if not any(isinstance(module, layers.Parts) for module in model.modules()):
        assert same({key.replace("base.", ""): tensor for key, tensor in rest.items()}, base)
    with safe_open(save_adapter(model, tmp_path / "a") / "adapter_model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == len({id(tensor) for tensor in new.values()})


# ---- switches, files, copies


@pairs
def test_switched_off_it_is_the_base_and_on_again_itself(method, name):
    base, model = output(plain(name), name), perturbed(method, name)
    on = output(model, name)
    assert not torch.equal(on, base)
    assert on.isfinite().all()
    with disabled(model):
        assert torch.equal(output(model, name), base)
    assert torch.equal(output(model, name), on)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(output(model, name), on)
    set_enabled(model, False)
    with disabled(model):
        pass
    assert torch.equal(output(model, name), base)
    set_enabled(model, True)
    assert torch.equal(output(model, name), on)


@pairs
def test_files_and_copies_compute_the_same(method, name, tmp_path):
    model = perturbed(method, name)
    for number, (key, axis) in enumerate(rank_axes(model).items()):
        size, room = len(axis), axis.limits()[1]
        if number % 3 == 0 and size > 1:
            axis.resize(range(1, size))
        elif number % 3 == 1 and "grow" in axis.capabilities and (room is None or room >= size + 2):
            axis.resize(grow=2, generator=generator(0, key, 1))
    perturb(model, 0.05, seed=2)
    want = output(model, name)
    save_adapter(model, tmp_path)
    torch.manual_seed(99)
    loaded = load_adapter(copy.deepcopy(plain(name)), tmp_path)
    assert torch.equal(output(loaded, name), want)
    assert same(loaded.state_dict(), model.state_dict())
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    load_adapter(perturbed(method, name, seed=5), tmp_path)  # into one of other ranks and values
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, name), want)
        perturb(twin, 0.05, seed=3)
        assert not torch.equal(output(twin, name), want)
    assert torch.equal(output(model, name), want)


# ---- merging


def refusal(model):
    """Why the model cannot be merged, or None: asked of the wrappers and of the weights they share."""
    if not all(w.mergeable for w in wrappers(model)):
        return "has no dense form"
    uses = [id(m._parameters["weight"]) for m in model.modules() if m._parameters.get("weight") is not None]
    tied = any(uses.count(id(w.innermost._parameters.get("weight"))) > 1 for w in wrappers(model))
    return "shares its weight" if tied else None


@pairs
def test_merging(method, name):
    model = perturbed(method, name)
    before, on, base = snapshot(model), output(model, name), output(plain(name), name)
    if (why := refusal(model)) is not None:
        with pytest.raises(ValueError, match=why):
            merge(model)
        assert same(model.state_dict(), before)
        return
    assert merge(model, keep_originals=True) is model
    assert looks_like(model, name)
    torch.testing.assert_close(output(model, name), on, rtol=1e-8, atol=1e-8)
    for again in (merge, functools.partial(adapted, method, name, into=None)):
        with pytest.raises(ValueError, match="merged"):
            again(model) if again is merge else adapt(model, "all", method)
    unmerge(model)
    assert same(model.state_dict(), before)
    assert torch.equal(output(model, name), on)
    with pytest.raises(ValueError, match="Nothing to unmerge"):
        unmerge(model)
    set_enabled(model, False)
    merge(model, keep_originals=True)
    assert torch.equal(output(model, name), base)
    unmerge(model)
    set_enabled(model, True)
    assert same(model.state_dict(), before)
    last = adapter_parameters(model)[-1]
    kept = last.detach().clone()
    with torch.no_grad():
        last.fill_(torch.nan)
    broken = {key: tensor.nan_to_num(7) for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        merge(model)
    assert same({key: tensor.nan_to_num(7) for key, tensor in model.state_dict().items()}, broken)
    with torch.no_grad():
        last.copy_(kept)
    assert torch.equal(output(model, name), on)
    merge(model)
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge(model)


# ---- precision, checkpointing, generation


@pairs
def test_half_precision(method, name):
    model = adapted(method, name, dtype=torch.bfloat16)
    want, have = output(plain(name, torch.bfloat16), name), output(model, name)
    assert have.dtype == torch.bfloat16
    assert torch.equal(have, want) == method.starts_at_base
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    perturb(model, 0.02)
    y = run(model, name)
    loss(y.float()).backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(model))
    single = adapted(method, name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(single, name)
    loss(y.float()).backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(single))


@pairs
def test_gradient_checkpointing_gives_the_same_gradients(method, name):
    model = perturbed(method, name).train()
    grads = []
    for again in (False, True):
        model.zero_grad()
        try:
            if again and name in TRANSFORMERS:
                model.activation_checkpointing_enable()
                y = run(model, name)
            else:
                y = checkpoint(run, model, name, use_reentrant=False) if again else run(model, name)
        except ValueError as error:  # a method may refuse, in a sentence
            assert again and "checkpointing" in str(error), error  # noqa: PT017, PT018
            return
        loss(y).backward()
        grads.append([p.grad.clone() for p in adapter_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pairs(names=GENERATE)
def test_generation(method, name):
    ids, arguments = MODELS[name][1]["input_ids"], {"max_new_tokens": 4, "do_sample": False}
    want = copy.deepcopy(plain(name)).generate(ids, **arguments)
    model = adapted(method, name)
    if method.starts_at_base:
        assert torch.equal(model.generate(ids, **arguments), want)
    perturb(model, 0.2)
    cached = model.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, use_cache=False, **arguments), cached)
    with disabled(model):
        assert torch.equal(model.generate(ids, **arguments), want)
    ids = MODELS[name][1]
    if name == "t5":  # its stacks have embeddings of their own
        return
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids["input_ids"])}
    with torch.no_grad():
        have = model(**{k: v for k, v in ids.items() if k != "input_ids"}, **embedded).logits
    torch.testing.assert_close(have, output(model, name), rtol=1e-10, atol=1e-10)


# ---- several adapters


def both(method, name, exclude=()):
    """A model with the adapters a and b, and what each computes alone; None where they cannot stand on one layer."""
    alone = {n: perturbed(method, name, seed=s, adapter=n, exclude=exclude) for s, n in ((1, "a"), (2, "b"))}
    outputs = {n: output(model, name) for n, model in alone.items()}
    model = copy.deepcopy(alone["a"])
    set_enabled(model, False)  # a method may read the weight that it starts from
    try:
        adapted(method, name, adapter="b", into=model, exclude=exclude)
    except ValueError as error:
        assert method.reads_weight and not method.mergeable and "outermost" in str(error)  # noqa: PT017, PT018
        return None
    set_enabled(model, "b")
    assert torch.equal(output(model, name), output(plain(name), name)) == method.starts_at_base
    sources = {path: layer for path, layer in wrapped_layers(alone["b"]).items()}
    with torch.no_grad():
        for path, layer in wrapped_layers(model).items():
            state = sources[path].nest[0].state_dict()
            for key, tensor in layer.nest[1].state_dict().items():
                if not key.startswith("base."):
                    tensor.copy_(state[key])
    for wrapper in wrappers(model):
        wrapper.refresh()
    return model, outputs


@pairs
def test_adapters_side_by_side(method, name):
    if (made := both(method, name)) is None:
        return
    model, outputs = made
    base, close = output(plain(name), name), {"rtol": 1e-10, "atol": 1e-10}
    for n in ("a", "b", "a"):
        set_enabled(model, n)
        torch.testing.assert_close(output(model, name), outputs[n], **close)
    with pytest.raises(ValueError, match="No adapter is called 'c'"):
        set_enabled(model, "c")
    with disabled(model):
        assert torch.equal(output(model, name), base)
    torch.testing.assert_close(output(model, name), outputs["a"], **close)

    set_enabled(model, "b")  # what is off does not train
    off = [p for w in wrappers(model) if w.name == "a" for _, p in w.own_parameters()]
    loss(run(model, name)).backward()
    assert all(p.grad is None for p in off)
    assert any(p.grad is not None for p in adapter_parameters(model))
    model.zero_grad()

    with pytest.raises(ValueError, match="No adapter is called 'c'"):
        delete_adapter(model, "c")
    delete_adapter(model, "a")
    torch.testing.assert_close(output(model, name), outputs["b"], **close)
    assert {w.name for w in wrappers(model)} == {"b"}
    delete_adapter(model, "b")
    assert looks_like(model, name)
    assert same(model.state_dict(), plain(name).state_dict())
    assert torch.equal(output(model, name), base)


@pairs
def test_rows_of_a_batch(method, name):
    batchwise = [path for path in NO_ROWS.get(name, ()) if any(path in p and method.wraps(m) for p, m in plain(name).named_modules())]
    if (made := both(method, name, batchwise)) is None:
        return
    model, outputs = made
    set_enabled(model, True)
    layered = all(isinstance(w.innermost, layers.MATRICES) or "Norm" in type(w.innermost).__name__ for w in wrappers(model))
    with select_rows(model, ["a", "b", None]):
        try:
            have = output(model, name)
        except ValueError as error:
            assert "ows" in str(error) and not layered, error  # noqa: PT017, PT018
            return
    want = torch.stack([outputs["a"][0], outputs["b"][1], output(plain(name), name)[2]])
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


@pairs(names=tuple(NO_ROWS))
def test_rows_are_refused_where_a_layer_computes_once_for_all(method, name):
    model = adapted(method, name)
    shared = [p for p, layer in wrapped_layers(model).items() if p.endswith(tuple(NO_ROWS[name]))]
    if shared:
        with select_rows(model, ["default", None, None]), pytest.raises(ValueError, match="Rows were selected"):
            run(model, name)


# ---- what is refused


def test_what_does_not_fit_is_refused_in_a_sentence(method, tmp_path):
    fitting = [name for m, name in PAIRS if m is method]
    model = copy.deepcopy(plain(fitting[0]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="No layer matches targets='no_such'"):
        adapt(model, ["no_such"], method)
    stray = next(path for path, module in model.named_modules() if path and not method.wraps(module))
    with pytest.raises(TypeError, match=rf"{method.__name__} wraps .*, not "):
        adapt(model, re.escape(stray), method)
    assert same(model.state_dict(), before)
    save_adapter(adapted(method, fitting[0]), tmp_path)
    for other in MODELS:
        if other != fitting[0]:
            target = copy.deepcopy(plain(other))
            with pytest.raises(ValueError, match="does not have|was made for"):
                load_adapter(target, tmp_path)
            assert looks_like(target, other)
            break
