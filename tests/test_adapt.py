"""Finding layers, freezing a model and wrapping it, on models that nobody prepared."""

import copy
from functools import partial

import pytest
import torch
import transformers
from torch import nn

from adaptrank.axes import rank_axes
from adaptrank.injection import adapt, apply_rank_pattern, describe, set_enabled
from adaptrank.parameterizations import (
    SVD,
    DoRA,
    HyperAdapt,
    LoRA,
    adapter_parameters,
    wrapped_layers,
)
from adaptrank.testing import perturb


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.conv = nn.LayerNorm(8), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        return self.norm(self.v_proj(torch.tanh(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.classifier = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def paths(model):
    return list(wrapped_layers(model))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


QV = [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "v_proj")]


# ---- targets


@pytest.mark.parametrize(
    ("targets", "exclude", "found"),
    [
        ("all-linear", (), [*QV, "classifier"]),
        ("all-linear", ["classifier"], QV),
        ("all-linear", r"layers\..*", ["classifier"]),
        (["q_proj"], (), QV[::2]),
        (["v_proj", "q_proj"], ["layers.1.q_proj"], [p for p in QV if p != "layers.1.q_proj"]),
        (["1.q_proj"], (), ["layers.1.q_proj"]),
        (r"layers\.[02]\.(q|v)_proj", (), [p for p in QV if ".1." not in p]),
        (r"layers\..*_proj", r".*\.v_proj", QV[::2]),
    ],
)
def test_targets(targets, exclude, found):
    model = adapt(Net(), targets, LoRA, exclude=exclude)
    assert paths(model) == found
    assert trainable(model) == {f"{path}.{name}" for path in found for name in "AB"}


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            ["q_porj"],
            "No layer matches targets='q_porj'; linear layers here end in q_proj, v_proj",
        ),
        (["q_proj", "k_proj"], "No layer matches targets='k_proj'"),
        (r"block\..*", r"No layer matches targets='block\\..*'"),
        (
            "q_proj",
            "A string is a regular expression over whole paths; "
            "for the last component write [q_proj]",
        ),
        ("all_linear", "or say 'all-linear'"),
        ("(", "targets='(' is not a regular expression"),
    ],
)
def test_nothing_matched(targets, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        adapt(Net(), targets, LoRA)
    assert sentence in str(error.value)


def test_everything_excluded():
    with pytest.raises(
        ValueError, match=r"targets='q_proj' less exclude='layers.*' leaves no layer"
    ):
        adapt(Net(), ["q_proj"], LoRA, exclude="layers.*")


def test_a_model_without_linear_layers_says_so():
    with pytest.raises(ValueError, match="no linear layer at all"):
        adapt(nn.Sequential(nn.Conv2d(3, 3, 1)), "all-linear", LoRA)


@pytest.mark.parametrize(
    ("target", "kind"), [("norm", "LayerNorm"), ("conv", "Conv1d"), ("0", "Block")]
)
def test_a_layer_of_another_kind_is_refused_by_name(target, kind):
    model = Net()
    with pytest.raises(
        TypeError, match=rf"layers\.0.*LoRA wraps Linear, Conv1D, Embedding or Conv2d, not {kind}"
    ):
        adapt(model, [target], LoRA)
    assert not paths(model)


def test_a_value_that_does_not_fit_names_the_layer():
    with pytest.raises(
        ValueError, match=r"layers\.0\.q_proj: rank=9 does not fit a 8x8 layer; use 1 to 8"
    ):
        adapt(Net(), "all-linear", partial(SVD, rank=9))


def test_no_parameterization():
    with pytest.raises(ValueError, match="needs a parameterization"):
        adapt(Net(), "all-linear")


def test_the_model_may_not_be_the_layer_itself():
    with pytest.raises(ValueError, match="wrap it directly"):
        adapt(nn.Linear(4, 4), "all-linear", LoRA)


# ---- what is wrapped, what trains


def test_it_starts_at_the_model_and_is_the_model():
    model, x = Net(), torch.randn(3, 8)
    want = model(x)
    assert adapt(model, "all-linear", [HyperAdapt, partial(LoRA, rank=2)]) is model
    assert torch.equal(model(x), want)
    assert [type(w).__name__ for w in model.classifier.nest] == ["HyperAdapt", "LoRA"]
    kinds = [line.split()[0] for line in describe(model).splitlines()]
    assert kinds == ["q_proj", "v_proj", "classifier", "trainable"]


def test_a_description_has_the_parameters_of_each_kind_and_of_the_head():
    """In a notebook and at a prompt the text is shown as it is."""
    model = adapt(Net(), ["q_proj"], partial(LoRA, rank=2), train_modules=["classifier"])
    per_layer = sum(p.numel() for p in adapter_parameters(model)) // 3
    whole = sum(p.numel() for p in model.classifier.parameters())
    text = describe(model)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["q_proj", "3", "x", "LoRA", f"{3 * per_layer:,}"]
    assert lines[1] == ["classifier", "trained", "whole", f"{whole:,}"]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert text.splitlines()[2].startswith(f"trainable {trained:,} of {total:,} parameters")
    assert text.endswith(", 6 ranks")
    assert repr(text) == text
    assert text._repr_html_() == f"<pre>{text}</pre>"


def test_training_mode_is_kept():
    model = Net().eval()
    assert (
        not adapt(model, "all-linear", partial(LoRA, dropout=0.5)).layers[0].q_proj.dropout.training
    )


def test_a_second_call_changes_nothing():
    call = partial(
        adapt, targets="all-linear", parameterization=[HyperAdapt, partial(LoRA, rank=2)]
    )
    model = call(Net(), train_modules=["norm"])
    perturb(model)
    rank_axes(model)["layers.0.q_proj:rank"].resize([0])
    modules, state, trains = (
        list(model.modules()),
        copy.deepcopy(model.state_dict()),
        trainable(model),
    )
    call(model, train_modules=["norm"])
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert trainable(model) == trains
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )


def test_a_second_call_does_not_undo_what_an_allocator_did():
    call = partial(adapt, targets="all-linear", parameterization=LoRA, rank_pattern={"q_proj": 3})
    model = call(Net())
    axis = rank_axes(model)["layers.0.q_proj:rank"]
    assert len(axis) == 3
    axis.resize([0, 1])
    call(model)
    assert len(axis) == 2


@pytest.mark.parametrize("other", [DoRA, partial(LoRA, rank=3), [LoRA, LoRA]])
def test_the_same_name_in_another_form_is_refused(other):
    model = adapt(Net(), "all-linear", LoRA)
    with pytest.raises(
        ValueError, match=r"layers\.0\.q_proj already carries adapter 'default' \(LoRA\)"
    ):
        adapt(model, "all-linear", other)


def test_an_earlier_entry_goes_on_training():
    model = adapt(Net(), ["q_proj"], LoRA, train_modules=["classifier"])
    first = trainable(model)
    adapt(model, ["v_proj"], HyperAdapt)
    assert trainable(model) == first | {
        f"layers.{i}.v_proj.{name}" for i in range(3) for name in ("da", "dc")
    }


def test_extra_modules_train_whole_and_are_not_wrapped():
    model = adapt(Net(), "all-linear", LoRA, train_modules=["classifier", "layers.1.norm"])
    assert paths(model) == QV
    assert {"classifier.weight", "classifier.bias", "layers.1.norm.weight"} <= trainable(model)
    assert "layers.0.norm.weight" not in trainable(model)
    with pytest.raises(
        ValueError, match=r"train_modules names 'classifer', .*\. Did you mean 'classifier'\?"
    ):
        adapt(Net(), "all-linear", LoRA, train_modules=["classifer"])


def test_two_named_adapters_are_switched_by_flags():
    model, x = Net(), torch.randn(3, 8)
    base = model(x).detach()
    adapt(model, "all-linear", LoRA, name="a")
    perturb(model)
    with_a = model(x).detach()
    adapt(model, ["q_proj"], HyperAdapt, name="b")
    with torch.no_grad():
        for i in range(3):
            model.layers[i].q_proj.da.add_(0.1)
    both = model(x).detach()
    modules = list(model.modules())
    for on, want in (
        (["a"], with_a),
        ([], base),
        (["a", "b"], both),
        (False, base),
        (True, both),
        ("a", with_a),
    ):
        set_enabled(model, on)
        assert torch.equal(model(x), want)
    set_enabled(model, "b")
    assert not torch.equal(model(x), both)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    with pytest.raises(
        ValueError, match=r"No adapter is called 'aa'; there are .*\. Did you mean 'a'\?"
    ):
        set_enabled(model, ["aa"])
    adapt(model, "all-linear", LoRA, name="a")  # still idempotent, under another wrapper
    assert list(model.modules()) == modules


# ---- sizes


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ({"layers.1.q_proj:rank": 2}, {"layers.1.q_proj": 2}),
        ({"layers.1.q_proj": 5}, {"layers.1.q_proj": 5}),
        ({"q_proj": 7}, {f"layers.{i}.q_proj": 7 for i in range(3)}),
        ({"q_proj": 0}, {f"layers.{i}.q_proj": 0 for i in range(3)}),
        ({r"layers\.[01]\..*": 1}, {p: 1 for p in QV if ".2." not in p}),
        ({"q_proj": {"rank": 6}}, {f"layers.{i}.q_proj": 6 for i in range(3)}),
        (
            {".*": 1, "layers.2.v_proj": 3, "layers.2.v_proj:rank": 9},
            {**dict.fromkeys(QV, 1), "layers.2.v_proj": 9},
        ),
    ],
)
def test_rank_pattern(pattern, sizes):
    model = adapt(Net(), QV, partial(LoRA, rank=4), rank_pattern=pattern)
    want = {f"{path}:rank": sizes.get(path, 4) for path in QV}
    assert {key: len(axis) for key, axis in rank_axes(model).items()} == want
    assert all(layer.scale == 4 for layer in wrapped_layers(model).values())
    x = torch.randn(3, 8)
    frozen = copy.deepcopy(model)
    set_enabled(frozen, False)
    assert torch.equal(model(x), frozen(x))


def test_what_a_rank_pattern_grows_depends_on_the_seed_alone():
    def grown(seed):
        torch.manual_seed(0)
        model = adapt(Net(), QV, partial(LoRA, rank=2), rank_pattern={"q_proj": 4}, seed=seed)
        return model.layers[0].q_proj.A.detach()

    assert torch.equal(grown(1), grown(1))
    assert not torch.equal(grown(1), grown(2))


def test_a_wrong_rank_pattern():
    with pytest.raises(
        ValueError,
        match=r"names 'q_porj', .*; axes here: layers.0.q_proj:rank,.*\. Did you mean 'q_proj'\?",
    ):
        adapt(Net(), QV, LoRA, rank_pattern={"q_porj": 2})
    with pytest.raises(ValueError, match=r"asks layers.0.q_proj:rank for 9 units; it holds 0 to 8"):
        adapt(Net(), QV, partial(SVD, rank=4), rank_pattern={"q_proj": 9})
    with pytest.raises(ValueError, match=r"for -1 units; it holds 0 to any number"):
        adapt(Net(), QV, LoRA, rank_pattern={"q_proj": -1})


def test_a_rank_pattern_of_a_second_adapter_leaves_the_first():
    model = adapt(Net(), ["q_proj"], partial(LoRA, rank=4), name="a")
    adapt(model, ["q_proj"], partial(LoRA, rank=4), name="b", rank_pattern={"q_proj": 2})
    sizes = {key: len(axis) for key, axis in rank_axes(model).items()}
    assert sizes["layers.0.q_proj.0:rank"] == 4
    assert sizes["layers.0.q_proj.1:rank"] == 2
    apply_rank_pattern(model, {"layers.0.q_proj": 3, "layers.1.q_proj.0:rank": 1})
    sizes = {key: len(axis) for key, axis in rank_axes(model).items()}
    assert list(sizes.values()) == [3, 3, 1, 2, 4, 2]


# ---- models that nobody prepared


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
    )


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    return transformers.BertForMaskedLM(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def inputs(make):
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    if make is vit:
        return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    return {"input_ids": ids, "labels": ids}


MODELS = [llama, gpt2, bert, vit, t5]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def case(request):
    model = request.param().eval()
    model.config._attn_implementation = "eager"
    return request.param, model, inputs(request.param)


def test_any_model_starts_at_itself_and_trains(case, linear_method):
    _, model, batch = case
    with torch.no_grad():  # a product of another kind may be chosen where gradients are needed
        want = model(**batch).logits
        adapt(
            model,
            "all-linear",
            linear_method,
            exclude=["classifier"] if hasattr(model, "classifier") else (),
        )
        assert torch.equal(model(**batch).logits, want)
    out = model(**batch)
    out.loss.backward()
    names = trainable(model)
    assert names
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert model(**batch).loss < out.loss


def test_any_model_computes_the_same_with_the_weights_put_back(case):
    make, model, batch = case
    plain = copy.deepcopy(model)
    adapt(model.double(), "all-linear", [HyperAdapt, LoRA])
    perturb(model, 0.02)
    plain.double()
    if make is vit:
        batch["pixel_values"] = batch["pixel_values"].double()
    for path, layer in wrapped_layers(model).items():
        target = plain.get_submodule(path)
        with torch.no_grad():
            target.weight.copy_(
                layer.weight.T
                if isinstance(target, transformers.pytorch_utils.Conv1D)
                else layer.weight
            )
    have, want = model(**batch).logits, plain(**batch).logits
    torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-8)


def test_all_linear_finds_the_linear_layers_of_each_model():
    kinds = {
        make.__name__: {p.rsplit(".", 1)[-1] for p in paths(adapt(make(), "all-linear", LoRA))}
        for make in MODELS
    }
    assert kinds["llama"] == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert kinds["gpt2"] == {"c_attn", "c_proj", "c_fc"}
    assert kinds["t5"] == {"q", "k", "v", "o", "wi", "wo"}
    assert "decoder" not in kinds["bert"]
    assert {"query", "key", "value", "dense"} <= kinds["bert"]


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: nn.ModuleDict({"model": m})], ids=["bare", "inside a module"]
)
def test_a_tied_head_is_left_out_and_stays_tied(wrap):
    model = llama()
    adapt(wrap(model), "all-linear", LoRA)
    assert isinstance(model.lm_head, nn.Linear)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_generation(make):
    torch.manual_seed(3)
    model = make().eval()
    ids = inputs(make)["input_ids"]
    arguments = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(ids, **arguments)
    adapt(model, "all-linear", [HyperAdapt, LoRA])
    assert torch.equal(model.generate(ids, **arguments), want)
    perturb(model, 0.3)
    after = model.generate(ids, **arguments)
    assert after.shape[0] == 2
    assert not torch.equal(after, want)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradient_checkpointing_gives_the_same_gradients(make, linear_method):
    model, batch = make().train(), inputs(make)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    adapt(model, "all-linear", linear_method)
    perturb(model, 0.02)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        )
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_half_precision_backbone_trains_float32_adapters(linear_method):
    model = llama().to(torch.bfloat16)
    batch = inputs(llama)
    want = model(**batch).logits
    adapt(model, "all-linear", linear_method)
    assert torch.equal(model(**batch).logits, want)
    model(**batch).loss.backward()
    assert all(
        p.grad.dtype == torch.float32
        for p in model.parameters()
        if p.requires_grad and p.grad is not None
    )


def test_exclude_takes_parts_of_the_model_and_names_what_it_does_not_find():
    model = llama()
    adapt(model, "all-linear", [LoRA], exclude=["mlp", r"model\.layers\.0\..*"])
    assert set(wrapped_layers(model)) == {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"}
    with pytest.raises(
        ValueError, match=r"exclude='q_pro' names nothing in this model. Did you mean 'q_proj'\?"
    ):
        adapt(llama(), "all-linear", [LoRA], exclude="q_pro")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ({"q_proj": "2"}, r"gives 'q_proj' the size '2'; a size is a whole number"),
        ({"q_proj": True}, r"gives 'q_proj' the size True"),
        ({"q_proj": None}, r"gives 'q_proj' the size None"),
        ({"q_proj": {"rnk": 2}}, r"gives 'q_proj' sizes of rnk, and .* is the axis there: 'rank'"),
    ],
)
def test_sizes_of_a_rank_pattern_are_checked(pattern, words):
    with pytest.raises(ValueError, match=words):
        adapt(llama(), "all-linear", [LoRA], rank_pattern=pattern)
