"""What users of other adapter libraries rely on, for every method of the folder on every kind of
small model it fits.

The invariants are those that HF PEFT holds each of its methods to. Nothing here names a method:
which layers it wraps is asked of the class, and a pair of which it wraps nothing is no pair.
"""

import copy
import functools
import itertools
import pickle
import re
from collections import Counter

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
from adaptrank.parameterizations import adapter_parameters, named_layers, wrapped_layers, wrappers
from adaptrank.testing import perturb

# ---- models


class MLP(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        pairs = enumerate(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=i % 2 == 0) for i, (n, m) in pairs)
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
        self.one, self.two = (
            nn.Conv2d(16, 24, 3, padding=1),
            nn.Conv2d(24, 16, 2, stride=2, bias=False),
        )
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
        q, k, v = (
            f(h).unflatten(-1, (4, 8)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        return x + self.out(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


def encoder():
    """torch's own layer: its attention reads the weight of `out_proj` rather than calling it."""
    return nn.Sequential(
        nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True), nn.Linear(32, 16)
    )


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=16,
        max_position_embeddings=32,
        type_vocab_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
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
NO_ROWS = {
    "encoder": ["out_proj"],
    "gpt2": ["wpe"],
    "bert": ["position_embeddings"],
    "t5": ["relative_attention_bias"],
}
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
        return model(
            **{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        ).logits
    return model(batch.to(dtype) if batch.is_floating_point() else batch)


def output(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return run(model, name)


@functools.cache
def base_output(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return output(plain(name, dtype), name)


def is_base(have: torch.Tensor, model: nn.Module, name: str) -> bool:
    """Whether it is what the plain model says: to the last bit, but where other products are
    summed.

    Those are a fused layer's in parts, and where torch reads a weight, the formula's.
    """
    want = base_output(name, have.dtype)
    if name == "encoder" or any(isinstance(module, layers.Parts) for module in model.modules()):
        return torch.allclose(have, want, rtol=0, atol=10 * torch.finfo(have.dtype).eps)
    return torch.equal(have, want)


def loss(y: torch.Tensor) -> torch.Tensor:
    return (
        y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    ).sum() + y.square().mean()


@functools.cache
def fits(method, name: str) -> dict[str, bool]:
    """Paths of layers that the method wraps in general -> whether it does so in their size, and
    they are called at all."""
    found = {
        path: layer
        for path, layer in named_layers(plain(name)).items()
        if path and method.wraps(layer)
    }
    # Layers that look alike are tried once: many models have every block twice.
    tried = {repr(layer): layer for layer in found.values()}
    taken = {text for text, layer in tried.items() if takes(method, layer)}
    called = found.keys() - {*UNUSED.get(name, ()), *reads_past(method, name)}
    return {path: repr(layer) in taken and path in called for path, layer in found.items()}


def takes(method, layer: nn.Module) -> bool:
    try:
        method(copy.deepcopy(layer))
    except (TypeError, ValueError):
        return False
    return True


def reads_past(method, name: str) -> list[str]:
    """Layers whose weight the model reads, in the hands of a method that has none."""
    found = {
        path: layer
        for path, layer in named_layers(plain(name)).items()
        if layers.is_read(layer) and method.wraps(layer) and takes(method, layer)
    }
    return [path for path, layer in found.items() if not method(copy.deepcopy(layer)).mergeable]


def wrapped_by(method, name: str) -> list[str]:
    return [path for path, fit in fits(method, name).items() if fit]


def adapted(method, name, *, dtype=torch.float64, seed=1, adapter="default", into=None, exclude=()):
    """The model, or a given one, with every layer that fits in the method's hands."""
    model = copy.deepcopy(plain(name, dtype)) if into is None else into
    misfits = [path for path, fit in fits(method, name).items() if not fit]
    torch.manual_seed(seed)
    return adapt(model, "all", method, exclude=[*misfits, *exclude], name=adapter)


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


def starts_at_base(model):
    return all(w.starts_at_base for w in wrappers(model))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(have, want):
    return have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)


def looks_like(model, name, biases=False):
    """Whether the model is, module for module and tensor for tensor, what it was before it was
    adapted, or has further biases."""
    base = plain(name, frozen_dtype(model))
    kinds = [[(path, type(m)) for path, m in one.named_modules()] for one in (model, base)]
    keys, had = list(model.state_dict()), list(base.state_dict())
    return (
        kinds[0] == kinds[1]
        and [k for k in keys if k in had or not (biases and k.endswith(".bias"))] == had
    )


PAIRS = [(method, name) for method in METHODS for name in MODELS if wrapped_by(method, name)]


COMMON = ("LoRA", "HyperAdapt")
"""Methods that `make test` tries on every model. The others meet two models there."""


def pairs(*names: str):
    chosen, met = [], Counter()
    for method, name in PAIRS:
        if name not in (names or MODELS):
            continue
        met[method] += 1
        is_rare = method.__name__ not in COMMON and met[method] > 2
        marks = [pytest.mark.tables] if is_rare else []
        chosen.append(pytest.param(method, name, id=f"{method.__name__}-{name}", marks=marks))
    return pytest.mark.parametrize(("method", "name"), chosen)


def test_every_method_fits_a_model():
    assert {method for method, _ in PAIRS} == set(METHODS)


# ---- start, training


@pairs()
def test_only_the_adapter_trains_and_all_of_it(method, name):
    model = adapted(method, name, dtype=torch.float32)
    assert is_base(output(model, name), model, name) == starts_at_base(model)
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
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = run(model, name)
    loss(y.float()).backward()
    check_gradients(model, y)


@pairs()
def test_half_precision(method, name):
    model = adapted(method, name, dtype=torch.bfloat16)
    have = output(model, name)
    assert have.dtype == torch.bfloat16
    assert is_base(have, model, name) == starts_at_base(model)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    perturb(model, 0.02)
    y = run(model, name)
    loss(y.float()).backward()
    check_gradients(model, y)


def check_gradients(model, y):
    assert y.isfinite().all()
    for wrapper in wrappers(model):
        for key, p in wrapper.own_parameters():
            assert p.grad is not None, (type(wrapper).__name__, key)
            assert p.grad.isfinite().all(), (type(wrapper).__name__, key)


# ---- switches and merging


def refusal(model):
    """Why the model cannot be merged, or None: asked of the wrappers and of the weights they
    share."""
    if not all(w.mergeable for w in wrappers(model)):
        return "has no dense form"
    uses = [
        id(m._parameters["weight"])
        for m in model.modules()
        if m._parameters.get("weight") is not None
    ]
    tied = any(uses.count(id(w.innermost._parameters.get("weight"))) > 1 for w in wrappers(model))
    return "shares its weight" if tied else None


@pairs()
def test_switched_off_or_merged_and_back_again(method, name):
    model = perturbed(method, name)
    before, on = snapshot(model), output(model, name)
    assert on.isfinite().all()
    assert not torch.allclose(on, base_output(name))
    with disabled(model):
        assert is_base(output(model, name), model, name)
    assert torch.equal(output(model, name), on)
    set_enabled(model, False)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert is_base(output(model, name), model, name)
    set_enabled(model, True)
    assert torch.equal(output(model, name), on)

    if (why := refusal(model)) is not None:
        with pytest.raises(ValueError, match=why):
            merge(model)
        assert same(model.state_dict(), before)
        return
    assert merge(model, keep_originals=True) is model
    assert looks_like(model, name, biases=True)  # a layer may get one
    torch.testing.assert_close(output(model, name), on, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="merged already"):
        merge(model)
    with pytest.raises(ValueError, match="is merged"):
        adapt(model, "all", method)
    unmerge(model)
    assert same(model.state_dict(), before)
    assert torch.equal(output(model, name), on)
    with pytest.raises(ValueError, match="Nothing to unmerge"):
        unmerge(model)

    set_enabled(model, False)
    merge(model, keep_originals=True)
    assert torch.equal(output(model, name), base_output(name))
    unmerge(model)
    set_enabled(model, True)
    assert same(model.state_dict(), before)

    last = adapter_parameters(model)[-1]
    kept = last.detach().clone()
    with torch.no_grad():
        last.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        merge(model)
    with torch.no_grad():
        last.copy_(kept)
    assert same(model.state_dict(), before)
    assert torch.equal(output(model, name), on)
    merge(model)
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge(model)


# ---- files and copies


@pairs()
def test_files_and_copies(method, name, tmp_path):
    model = perturbed(method, name)
    new = own_tensors(model)  # the adapter's tensors, and no others, are new
    rest = {key: tensor for key, tensor in model.state_dict().items() if key not in new}
    base = plain(name).state_dict()
    assert sum(t.numel() for t in rest.values()) == sum(t.numel() for t in base.values())
    if not any(isinstance(module, layers.Parts) for module in model.modules()):
        assert same({re.sub(r"\bbase\.", "", key): tensor for key, tensor in rest.items()}, base)

    for number, (key, axis) in enumerate(rank_axes(model).items()):
        size, room = len(axis), axis.limits()[1]
        if number % 3 == 0 and size > 1:
            axis.resize(range(1, size))
        elif number % 3 == 1 and "grow" in axis.capabilities and (room is None or room >= size + 2):
            axis.resize(grow=2, generator=generator(0, key, 1))
    perturb(model, 0.05, seed=2)
    want, state = output(model, name), model.state_dict()
    with safe_open(
        save_adapter(model, tmp_path) / "adapter_model.safetensors", framework="pt"
    ) as file:
        assert len(list(file.keys())) == len({id(tensor) for tensor in own_tensors(model).values()})
    torch.manual_seed(99)
    loaded = load_adapter(copy.deepcopy(plain(name)), tmp_path)
    assert same(loaded.state_dict(), state)
    assert torch.equal(output(loaded, name), want)
    assert trainable(loaded) == trainable(model)
    other = adapted(method, name, seed=5)  # of other ranks and values
    assert same(load_adapter(other, tmp_path).state_dict(), state)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, name), want)
        perturb(twin, 0.05, seed=3)
    assert same(model.state_dict(), state)


# ---- checkpointing, generation


@pairs()
def test_gradient_checkpointing_gives_the_same_gradients(method, name):
    model = perturbed(method, name).train()
    grads = []
    for again in (False, True):
        model.zero_grad()
        try:
            if again and name in TRANSFORMERS:
                model.activation_checkpointing_enable()
            y = (
                checkpoint(run, model, name, use_reentrant=False)
                if again and name not in TRANSFORMERS
                else run(model, name)
            )
        except ValueError as error:  # a method may refuse, in a sentence
            assert again and "checkpointing" in str(error), error  # noqa: PT017, PT018
            return
        loss(y).backward()
        grads.append([p.grad.clone() for p in adapter_parameters(model)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-10, atol=1e-12
        )  # T5 sums its position biases in another order


@pairs(*GENERATE)
def test_generation(method, name):
    batch, arguments = MODELS[name][1], {"max_new_tokens": 4, "do_sample": False}
    ids, model = batch["input_ids"], adapted(method, name)
    with disabled(model):
        want = model.generate(ids, **arguments)
    assert torch.equal(want, generated(name))
    if starts_at_base(model):
        assert torch.equal(model.generate(ids, **arguments), want)
    perturb(model, 0.2)
    cached = model.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, use_cache=False, **arguments), cached)
    if name != "t5":  # its stacks have embeddings of their own
        with torch.no_grad():
            have = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        torch.testing.assert_close(have, output(model, name), rtol=1e-10, atol=1e-10)


@functools.cache
def generated(name):
    return copy.deepcopy(plain(name)).generate(
        MODELS[name][1]["input_ids"], max_new_tokens=4, do_sample=False
    )


# ---- several adapters


@pairs()
def test_adapters_side_by_side_and_by_rows(method, name):
    left = [
        p for p in wrapped_by(method, name) if p.endswith(tuple(NO_ROWS.get(name, ["no such"])))
    ]
    alone = {
        n: perturbed(method, name, seed=s, adapter=n, exclude=left) for s, n in ((1, "a"), (2, "b"))
    }
    outputs = {n: output(model, name) for n, model in alone.items()}
    model = alone["a"]
    set_enabled(model, False)  # a method may read the weight that it starts from
    try:
        adapted(method, name, adapter="b", into=model, exclude=left)
    except ValueError as error:  # of what has no weight
        assert not all(w.mergeable for w in wrappers(model)) and "outermost" in str(error), error  # noqa: PT017, PT018
        return
    set_enabled(model, "b")
    assert is_base(output(model, name), model, name) == starts_at_base(model)
    sources = wrapped_layers(alone["b"])
    with torch.no_grad():
        for path, layer in wrapped_layers(model).items():
            state = sources[path].state_dict()
            for key, tensor in layer.state_dict().items():
                if not key.startswith("base."):
                    tensor.copy_(state[key])
    for wrapper in wrappers(model):
        wrapper.refresh()

    close = {"rtol": 1e-10, "atol": 1e-10}
    for n in ("a", "b", "a"):
        set_enabled(model, n)
        torch.testing.assert_close(output(model, name), outputs[n], **close)
    with disabled(model):
        assert is_base(output(model, name), model, name)
    set_enabled(model, "b")  # what is off does not train
    off = [p for w in wrappers(model) if w.name == "a" for _, p in w.own_parameters()]
    loss(run(model, name)).backward()
    assert all(p.grad is None for p in off)
    assert any(p.grad is not None for p in adapter_parameters(model))

    set_enabled(model, True)
    with select_rows(model, ["a", "b", None]):
        try:
            have = output(model, name)
        except ValueError as error:  # a module that is wrapped whole
            assert "ows" in str(error), error  # noqa: PT017
            assert not all(isinstance(w.innermost, layers.MATRICES) for w in wrappers(model))
        else:
            want = torch.stack([outputs["a"][0], outputs["b"][1], base_output(name)[2]])
            torch.testing.assert_close(have, want, **close)

    for wrong in (set_enabled, delete_adapter):
        with pytest.raises(ValueError, match="No adapter is called 'c'"):
            wrong(model, "c")
    delete_adapter(model, "a")
    torch.testing.assert_close(output(model, name), outputs["b"], **close)
    assert {w.name for w in wrappers(model)} == {"b"}
    delete_adapter(model, "b")
    assert looks_like(model, name)
    assert same(model.state_dict(), plain(name).state_dict())
    assert torch.equal(output(model, name), base_output(name))


@pairs(*NO_ROWS)
def test_rows_are_refused_where_a_layer_computes_once_for_all(method, name):
    left = [p for p in wrapped_by(method, name) if not p.endswith(tuple(NO_ROWS[name]))]
    if len(left) == len(wrapped_by(method, name)):
        return
    model = adapted(method, name, exclude=left)
    with (
        pytest.raises(ValueError, match=r"Rows were selected|reads this weight"),
        select_rows(model, ["default", None, None]),
    ):
        run(model, name)


# ---- what is refused


def test_what_does_not_fit_is_refused_in_a_sentence(method, tmp_path):
    first, *_ = [name for m, name in PAIRS if m is method]
    model = copy.deepcopy(plain(first))
    with pytest.raises(ValueError, match="No layer matches targets='no_such'"):
        adapt(model, ["no_such"], method)
    stray = next(
        path for path, module in model.named_modules() if path and not method.wraps(module)
    )
    with pytest.raises(TypeError, match=rf"{method.__name__} wraps .*, not "):
        adapt(model, re.escape(stray), method)
    assert same(model.state_dict(), plain(first).state_dict())
    for path in reads_past(method, "encoder"):
        with pytest.raises(TypeError, match="reads this weight"):
            adapt(copy.deepcopy(plain("encoder")), re.escape(path), method)
    save_adapter(adapted(method, first), tmp_path)
    other = next(name for name in reversed(MODELS) if name != first)
    model = copy.deepcopy(plain(other))
    with pytest.raises(ValueError, match=r"does not have|was made for"):
        load_adapter(model, tmp_path)
    assert looks_like(model, other)
