"""Several adapters on one model: switched, selected row by row, deleted, written to one file."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import (
    adapt,
    delete_adapter,
    disabled,
    load_adapter,
    merge,
    rank_axes,
    save_adapter,
    select_rows,
    set_enabled,
    unmerge,
)
from adaptrank.parameterizations import (
    SVD,
    DoRA,
    HyperAdapt,
    LoRA,
    PiCa,
    TensorTrainAdapter,
    wrapped_layers,
    wrappers,
)
from adaptrank.testing import perturb

IDS = torch.arange(3, 21).reshape(3, 6)


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


NESTS = {"a": [LoRA], "b": [HyperAdapt, partial(LoRA, rank=2)], "c": [DoRA]}


def three(model=None):
    """A model with three adapters on overlapping layers.

    They are one method, a nest of two, and a method that reads the weight it wraps.
    """
    model = model or llama()
    adapt(model, ["q_proj", "v_proj", "down_proj"], NESTS["a"], name="a")
    adapt(model, ["q_proj", "gate_proj"], NESTS["b"], name="b")
    adapt(model, ["v_proj", "gate_proj"], NESTS["c"], name="c")
    perturb(model, 0.2)
    return model


def alone(model, name):
    """The logits with one adapter on, or with none."""
    set_enabled(model, [name] if name else False)
    found = logits(model)
    set_enabled(model, True)
    return found


def close(have, want):
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)


# ---- off for a moment


def test_disabled_is_the_base_and_gives_every_switch_back():
    model = three()
    set_enabled(model, ["a", "c"])
    flags, want = [w.enabled for w in wrappers(model)], logits(model)
    with disabled(model):
        assert torch.equal(logits(model), logits(llama()))
        with disabled(model):
            pass
        assert not any(w.enabled for w in wrappers(model))
    assert [w.enabled for w in wrappers(model)] == flags
    assert torch.equal(logits(model), want)


def test_an_exception_inside_gives_the_state_back():
    model = three()
    want = logits(model)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    with pytest.raises(KeyError), select_rows(model, ["a", "b", "c"]):
        raise KeyError
    with pytest.raises(ValueError, match="reads 2 rows"), select_rows(model, ["a", "b", "c"]):
        logits(model, IDS[:2])
    with (
        pytest.raises(ValueError, match="No adapter is called 'd'"),
        select_rows(model, ["a", "d", None]),
    ):
        pass
    assert all(w.enabled and w.rows is None for w in wrappers(model))
    assert torch.equal(logits(model), want)


def test_a_merged_model_cannot_be_switched_off():
    model = three()
    want = logits(model)
    merge(model, keep_originals=True)
    with pytest.raises(ValueError, match=r"is merged, .*; unmerge\(\) it first"), disabled(model):
        pass
    assert torch.equal(logits(unmerge(model)), want)


# ---- a row of a batch, an adapter


@pytest.mark.parametrize(
    "names",
    [("a", "b", "c"), ("c", None, "a"), (None, None, None), ("b", "b", "b"), ("c", "b", "b")],
    ids=str,
)
def test_each_row_runs_with_its_own_adapter_alone(names):
    model = three()
    with select_rows(model, names):
        have = logits(model)
    for row, name in enumerate(names):
        close(have[row], alone(model, name)[row])
    assert all(w.rows is None for w in wrappers(model))


def test_rows_of_what_is_switched_off_run_with_the_base():
    model = three()
    set_enabled(model, ["a"])
    with select_rows(model, ["a", "b", None]):
        have = logits(model)
    close(have[0], logits(model)[0])
    close(have[1:], alone(model, None)[1:])


def test_selections_nest():
    model = three()
    with select_rows(model, ["a", "a", "a"]):
        with select_rows(model, ["b", "c", None]):
            inner = logits(model)
        outer = logits(model)
    close(inner[0], alone(model, "b")[0])
    close(outer, alone(model, "a"))


def test_every_method_by_rows(method):
    if not method.wraps(nn.Linear(8, 8)):
        return
    base = method.example().double()
    model = nn.Sequential(base)
    adapt(model, ["0"], partial(LoRA, rank=2), name="inner")
    adapt(model, ["0"], method, name="outer")
    perturb(model)
    x = torch.randn(3, 4, base.in_features, dtype=torch.float64)
    with select_rows(model, ["outer", "inner", None]):
        have = model(x)
        have.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    want = []
    for row, names in enumerate((["outer"], ["inner"], [])):
        set_enabled(model, names)
        want.append(model(x[row : row + 1]))
    close(have, torch.cat(want))


def test_gradients_reach_each_adapter_from_its_rows_alone():
    model = three()
    with select_rows(model, ["a", None, "b"]):
        model(IDS, labels=IDS).loss.backward()
    got = {
        w.name
        for w in wrappers(model)
        if any(p.grad is not None and p.grad.any() for _, p in w.own_parameters())
    }
    assert got == {"a", "b"}


def test_recomputed_activations_see_the_same_rows_while_the_selection_lasts():
    grads = []
    for checkpointed in (False, True):
        model = three().train()
        if checkpointed:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        with select_rows(model, ["a", None, "b"]):
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_a_batch(use_cache):
    model = three()
    arguments = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    names = ["a", None, "b"]
    with select_rows(model, names):
        have = model.generate(IDS, **arguments)
    for row, name in enumerate(names):
        set_enabled(model, [name] if name else False)
        assert torch.equal(have[row : row + 1], model.generate(IDS[row : row + 1], **arguments))
    set_enabled(model, True)
    with (
        pytest.raises(ValueError, match="selected for a batch of 3, and this LoRA reads 6 rows"),
        select_rows(model, names),
    ):
        model.generate(IDS, num_beams=2, **arguments)
    assert all(w.rows is None for w in wrappers(model))


def test_rows_of_embeddings_and_convolutions():
    torch.manual_seed(0)
    model = nn.ModuleDict({"tokens": nn.Embedding(10, 4), "conv": nn.Conv2d(2, 4, 3)}).double()
    adapt(model, "all", LoRA, name="a")
    adapt(model, "all", HyperAdapt, name="b")
    perturb(model)
    ids, image = torch.arange(6).reshape(3, 2), torch.randn(3, 2, 5, 5, dtype=torch.float64)
    for layer, x in ((model["tokens"], ids), (model["conv"], image)):
        with select_rows(model, ["b", None, "a"]):
            have = layer(x)
        for row, names in enumerate((["b"], [], ["a"])):
            set_enabled(model, names)
            close(have[row], layer(x)[row])
        set_enabled(model, True)


# ---- deleting


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_adapters_are_deleted_in_any_order(order):
    model, plain = three(), llama()
    kinds = {path: type(module) for path, module in plain.named_modules()}
    for number, name in enumerate(order):
        rest = order[number + 1 :]
        want = [alone(model, other) for other in rest]
        assert delete_adapter(model, name) is model
        assert {w.name for w in wrappers(model)} == set(rest)
        for other, logits_before in zip(rest, want, strict=True):
            assert torch.equal(alone(model, other), logits_before), (
                f"{other} changed when {name} went"
            )
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(ValueError, match="No adapter is called 'a'"):
        delete_adapter(model, "a")


def test_deleting_an_unknown_name_changes_nothing():
    model = three()
    modules = list(model.modules())
    with pytest.raises(
        ValueError, match=r"No adapter is called 'aa'; there are a, b, c\. Did you mean 'a'\?"
    ):
        delete_adapter(model, "aa")
    assert list(model.modules()) == modules


def test_a_wrapper_outside_of_a_deleted_one_forgets_what_it_computed_from_it():
    """DoRA keeps the norms of a plain base. It must not keep the norms over a deleted adapter."""
    model = adapt(nn.Sequential(nn.Linear(8, 6).double()), "all-linear", LoRA, name="a")
    adapt(model, "all-linear", DoRA, name="b")
    perturb(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    model(x)
    delete_adapter(model, "a")
    for _ in range(2):
        close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_what_lost_what_it_wrapped_is_told_to_refresh(monkeypatch):
    model, told = three(), []
    for method in (HyperAdapt, LoRA, DoRA):
        monkeypatch.setattr(method, "refresh", lambda self: told.append(self))
    outside = [
        w
        for layer in wrapped_layers(model).values()
        for w in layer.nest
        if getattr(w.base, "name", "") == "a"
    ]
    delete_adapter(model, "a")
    assert outside
    assert told == outside


def test_what_was_deleted_can_come_again():
    model = three()
    want = {name: alone(model, name) for name in "bc"}
    delete_adapter(model, "a")
    adapt(model, ["q_proj"], partial(SVD, rank=2), name="a")
    for name in "bc":
        assert torch.equal(alone(model, name), want[name])
    assert torch.equal(alone(model, "a"), alone(model, None))
    assert {type(w).__name__ for w in wrappers(model) if w.name == "a"} == {"SVD"}


def test_what_trains_after_a_deletion():
    model = three()
    before = {id(p) for w in wrappers(model) if w.name != "a" for _, p in w.own_parameters()}
    delete_adapter(model, "a")
    assert {id(p) for p in model.parameters() if p.requires_grad} == before


def test_a_layer_used_twice_loses_its_wrapper_at_both_places():
    layer = nn.Linear(4, 4)
    model = adapt(nn.Sequential(layer, nn.Tanh(), layer), "all-linear", LoRA)
    delete_adapter(model)
    assert model[0] is model[2] is layer


def test_a_bare_wrapper_is_not_deleted():
    with pytest.raises(ValueError, match="itself a wrapper"):
        delete_adapter(LoRA(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="itself a wrapper"):
        merge(LoRA(nn.Linear(4, 4)))


# ---- files


def test_two_adapters_in_one_file_after_a_third_was_deleted(tmp_path):
    model = three()
    for number, axis in enumerate(rank_axes(model).values()):
        axis.resize(range(1 + number % 2))
    delete_adapter(model, "a")
    save_adapter(model, tmp_path)
    again = load_adapter(llama(), tmp_path)
    assert {w.name for w in wrappers(again)} == {"b", "c"}
    for name in ("b", "c", None):
        assert torch.equal(alone(again, name), alone(model, name))
    with select_rows(model, ["c", "b", None]), select_rows(again, ["c", "b", None]):
        assert torch.equal(logits(again), logits(model))
    delete_adapter(again, "b")
    assert torch.equal(alone(again, "c"), alone(model, "c"))
    merge(again)
    close(logits(again), alone(model, "c"))


@pytest.mark.parametrize("inner", [LoRA, HyperAdapt], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("outer", [LoRA, PiCa], ids=lambda cls: cls.__name__)
def test_files_of_the_same_name_are_loaded_side_by_side(inner, outer, tmp_path):
    """Each adapter was trained by itself, under the default name.

    Loaded together, each computes what it did alone, and is saved as it was.
    """
    want = {}
    for number, (name, method) in enumerate((("a", inner), ("b", outer)), 2):
        alone = adapt(llama(), "all-linear", method)
        for key, axis in rank_axes(alone).items():
            axis.resize(range(1 + len(key) % 3))
        perturb(alone, seed=number)
        want[name] = logits(alone)
        save_adapter(alone, tmp_path / name)
    model = llama()
    for name in want:
        load_adapter(model, tmp_path / name, name=name)
    for name, alone in want.items():
        set_enabled(model, name)
        torch.testing.assert_close(logits(model), alone, rtol=1e-10, atol=1e-10)
        load_adapter(model, tmp_path / name, name=name)  # once more: into the same wrappers
        save_adapter(model, tmp_path / f"{name}2", names=[name])
        again = load_adapter(llama(), tmp_path / f"{name}2")
        torch.testing.assert_close(logits(again), alone, rtol=1e-10, atol=1e-10)
        assert {w.name for layer in wrapped_layers(again).values() for w in layer.nest} == {name}
    with pytest.raises(ValueError, match=r"already carries LoRA|already carries HyperAdapt"):
        load_adapter(model, tmp_path / "b" if outer is not inner else _odd(tmp_path), name="a")
    with pytest.raises(ValueError, match=r"No adapter is called 'c'; there are a, b\."):
        save_adapter(model, tmp_path / "c", names="c")
    save_adapter(model, tmp_path / "both")
    with pytest.raises(ValueError, match="holds adapters called a, b; leave `name` out"):
        load_adapter(llama(), tmp_path / "both", name="a")


def _odd(folder):
    return save_adapter(adapt(llama(), "all-linear", partial(LoRA, rank=3)), folder / "odd")


def test_a_file_keeps_the_order_of_names_in_a_nest(tmp_path):
    model = three()
    save_adapter(model, tmp_path)
    again = load_adapter(llama(), tmp_path)
    for path, layer in wrapped_layers(model).items():
        assert [(type(w), w.name) for w in wrapped_layers(again)[path].nest] == [
            (type(w), w.name) for w in layer.nest
        ]
    for on in (["a"], ["b"], ["c"], ["a", "c"], ["c", "b"], True, False):
        set_enabled(model, on)
        set_enabled(again, on)
        assert torch.equal(logits(again), logits(model))


def test_copies_are_switched_by_themselves():
    model = three()
    twin = copy.deepcopy(model)
    with disabled(model):
        assert torch.equal(logits(twin), alone(twin, None)) is False
        assert all(w.enabled for w in wrappers(twin))


# ---- a call that fails leaves the model as it was


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"targets": ["q_proj", "v_proj"], "parameterization": partial(SVD, rank=20)},
            "does not fit",
        ),
        (
            {"targets": ["q_proj"], "parameterization": LoRA, "rank_pattern": {"x_proj": 3}},
            "names 'x_proj'",
        ),
        (
            {"targets": ["q_proj"], "parameterization": LoRA, "rank_pattern": {"q_proj": -1}},
            "for -1 units",
        ),
        ({"targets": ["q_proj"], "parameterization": LoRA, "name": "b"}, "already carries"),
    ],
    ids=["value", "unknown pattern", "size", "another form"],
)
def test_a_failing_adapt(arguments, sentence):
    model = three()
    modules, trains = (
        list(model.modules()),
        {n for n, p in model.named_parameters() if p.requires_grad},
    )
    with pytest.raises(ValueError, match=sentence):
        adapt(model, **{"name": "d", **arguments})
    assert list(model.modules()) == modules
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains


def test_a_failing_adapt_on_a_fresh_model_freezes_nothing():
    model = llama()
    with pytest.raises(ValueError, match="does not fit"):
        adapt(model, "all-linear", partial(SVD, rank=20))
    assert all(p.requires_grad for p in model.parameters())
    assert not wrapped_layers(model)


# ---- what one adapter does to another, or to itself when it is made in several calls


class Two(nn.Module):
    """Two layers of one kind and shape, whose shared tensors `adapt` ties."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 16)}) for _ in range(2))

    def forward(self, x):
        return self.layers[1]["q"](torch.tanh(self.layers[0]["q"](x)))


X = torch.linspace(-1, 1, 48).reshape(3, 16)


def test_a_further_adapter_does_not_tie_what_others_have_trained_apart():
    model = adapt(adapt(Two(), ["0.q"], PiCa), ["1.q"], PiCa)
    perturb(model)
    before = model(X)
    adapt(model, "all-linear", LoRA, name="further")
    assert torch.equal(model(X), before)


def test_an_adapter_made_in_two_calls_is_loaded_untied(tmp_path):
    model = adapt(adapt(Two(), ["0.q"], PiCa), ["1.q"], PiCa)
    perturb(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(Two(), tmp_path)
    assert torch.equal(loaded(X), model(X))
    assert sum(p.requires_grad for p in loaded.parameters()) == 2


def test_an_adapter_made_in_one_call_is_tied_whatever_its_neighbours_and_stays_so(tmp_path):
    model = adapt(Two(), ["0.q"], LoRA, name="below")
    adapt(model, "all-linear", PiCa, name="tied")
    perturb(model)
    set_enabled(model, "tied")
    save_adapter(model, tmp_path, names=["tied"])
    for host in (Two(), adapt(Two(), ["1.q"], LoRA, name="other")):
        load_adapter(host, tmp_path)
        assert torch.equal(host(X), model(X))
        assert len({id(w.M) for w in wrappers(host) if w.name == "tied"}) == 1


def test_a_second_call_changes_nothing_where_the_nest_cannot_stand_on_itself():
    nest = [DoRA, TensorTrainAdapter]
    model = adapt(Two(), "all-linear", nest)
    before = wrappers(model)
    adapt(model, "all-linear", nest)
    assert wrappers(model) == before


def test_a_layer_may_be_called_by_keyword():
    layer = HyperAdapt(LoRA(nn.Linear(16, 16)))
    perturb(layer)
    assert torch.equal(layer(input=X), layer(X))
