"""Modules that train whole: a model has one of each, and a file has the values of its own."""

import copy
import logging
import pickle
from functools import partial

import pytest
import torch
from conftest import perturb
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from adaptrank import Adapter, adapt, delete_adapter, load_adapter, merge, save_adapter, unmerge
from adaptrank._errors import UserError
from adaptrank.artifacts import frozen_weights, read_adapter, trained_modules
from adaptrank.artifacts.trainer_files import trained_tensors
from adaptrank.axes import PRUNED
from adaptrank.backbones import fingerprint
from adaptrank.composition import compose
from adaptrank.interop.peft import export_peft, import_peft
from adaptrank.interop.trainers import BaseReference
from adaptrank.modules import SequenceClassification
from adaptrank.parameterizations import HyperAdapt, LoRA, wrapped_layers

IDS = torch.arange(3, 21).reshape(3, 6)
HEAD = {"classifier.weight", "classifier.bias"}


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def made(folder, seed, train_modules=("classifier",), make=bert, targets=("query",)):
    """Save an adapter that was trained with these modules, and return its logits."""
    model = adapt(make(), list(targets), LoRA, train_modules=train_modules)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder)
    return logits(model)


def assert_unchanged(model, before, kinds):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert [type(module) for module in model.modules()] == kinds


# ---- two adapters, one head


@pytest.mark.parametrize("first_has_head", [True, False])
def test_a_second_adapter_with_a_head_of_its_own_is_refused(first_has_head, tmp_path):
    want = made(tmp_path / "a", 1, ["classifier"] if first_has_head else [])
    want_b = made(tmp_path / "b", 2)
    model = load_adapter(bert(), tmp_path / "a", name="a")
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    sentence = (
        r"was trained with its own classifier, and adapter 'a' of this model uses another one; "
        r"load each into a copy of the base, or call adaptrank.merge\(model\) or "
        r"adaptrank.delete_adapter\(model, 'a'\) first"
    )
    with pytest.raises(UserError, match=sentence):
        load_adapter(model, tmp_path / "b", name="b")
    assert_unchanged(model, before, kinds)
    assert torch.equal(logits(model), want)
    # What the sentence says.
    delete_adapter(model, "a")
    assert torch.equal(logits(load_adapter(model, tmp_path / "b", name="b")), want_b)
    merged = load_adapter(
        merge(load_adapter(bert(), tmp_path / "a", name="a")), tmp_path / "b", name="b"
    )
    assert torch.equal(merged.classifier.weight, model.classifier.weight)


def test_adapters_that_share_a_head_come_back_side_by_side(tmp_path):
    model = adapt(bert(), ["query"], LoRA, name="a", train_modules=["classifier"])
    adapt(model, ["query", "value"], HyperAdapt, name="b")
    perturb(model, 0.1)
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name, names=[name])
    again = bert()
    for name in ("a", "b"):
        load_adapter(again, tmp_path / name)
    torch.testing.assert_close(logits(again), logits(model))
    # The same adapter once more replaces its own head.
    perturb(again, 0.1)
    delete_adapter(again, "b")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_an_adapter_of_the_frozen_head_after_one_with_a_head_is_warned_of(tmp_path, caplog):
    made(tmp_path / "a", 1)
    made(tmp_path / "p", 2, [])
    model = load_adapter(bert(), tmp_path / "a", name="a")
    with caplog.at_level(logging.WARNING):
        load_adapter(model, tmp_path / "p", name="p")
    assert "The base differs from the one this adapter was trained on" in caplog.text


def test_a_file_of_peft_with_a_head_is_refused_beside_another_adapter(tmp_path):
    made(tmp_path / "a", 1)
    made(tmp_path / "b", 2)
    export_peft(load_adapter(bert(), tmp_path / "b"), tmp_path / "peft")
    model = load_adapter(bert(), tmp_path / "a", name="a")
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(UserError, match="its own classifier, and adapter 'a' of this model"):
        import_peft(model, tmp_path / "peft", name="b")
    assert_unchanged(model, before, kinds)
    assert set(trained_modules(import_peft(bert(), tmp_path / "peft"))) == HEAD


def test_a_file_that_cuts_its_base_is_refused_beside_another_adapter(tmp_path):
    model = adapt(llama(), ["q_proj"], LoRA)
    # LoRAPrune leaves the groups that are kept with the model.
    vars(model)[PRUNED] = {"model.layers.0.mlp:channels": [0, 1, 2]}
    save_adapter(model, tmp_path)
    assert load_adapter(llama(), tmp_path).model.layers[0].mlp.up_proj.out_features == 3
    other = adapt(llama(), ["q_proj", "up_proj"], LoRA, name="p")
    before, kinds = copy.deepcopy(other.state_dict()), [type(m) for m in other.modules()]
    with pytest.raises(
        UserError, match="cuts heads or channels out of its base, which adapter 'p'"
    ):
        load_adapter(other, tmp_path)
    assert_unchanged(other, before, kinds)


# ---- one tensor under two names


def test_embeddings_that_trained_apart_are_refused_where_the_model_ties_them(tmp_path):
    want = made(tmp_path, 1, ["embed_tokens", "lm_head"], llama, ["q_proj"])
    model = llama(tied=True)
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    sentence = r"trained model.embed_tokens.weight apart from lm_head.weight, and this model ties"
    with pytest.raises(UserError, match=sentence):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before, kinds)
    # What the error says.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert torch.equal(logits(load_adapter(model, tmp_path)), want)


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
def test_one_of_two_embeddings_is_refused_where_the_model_ties_them(trained, tmp_path):
    made(tmp_path, 1, [trained], llama, ["q_proj"])
    with pytest.raises(UserError, match=rf"{trained}.weight and leaves .*weight as it was"):
        load_adapter(llama(tied=True), tmp_path)


@pytest.mark.parametrize("into_tied", [True, False])
def test_embeddings_that_trained_as_one_load_with_a_tie_and_without(into_tied, tmp_path):
    want = made(tmp_path, 1, ["embed_tokens"], partial(llama, True), ["q_proj"])
    assert torch.equal(logits(load_adapter(llama(into_tied), tmp_path)), want)


@pytest.mark.parametrize("others", ["first", "average", "drop"])
def test_adapters_of_tied_embeddings_are_composed(others, tmp_path):
    for seed in (1, 2):
        made(tmp_path / f"{seed}", seed, ["embed_tokens"], partial(llama, True), ["q_proj"])
    one, two = (load_adapter(llama(True), tmp_path / f"{seed}") for seed in (1, 2))
    model = llama(tied=True)
    compose(model, [tmp_path / "1", tmp_path / "2"], others=others)
    want = {
        "first": one.lm_head.weight,
        "average": (one.lm_head.weight + two.lm_head.weight) / 2,
        "drop": llama(True).lm_head.weight,
    }[others]
    torch.testing.assert_close(model.lm_head.weight, want)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bool(trained_modules(model)) == (others != "drop")


def test_values_are_compared_in_the_dtype_of_the_model(tmp_path):
    """A head that trained in float32 beside a second adapter is loaded into half precision."""
    model = adapt(llama(), ["q_proj"], LoRA, train_modules=["embed_tokens"])
    adapt(model, ["v_proj"], LoRA, name="b")
    perturb(model, 0.1)
    for name in ("default", "b"):
        save_adapter(model, tmp_path / name, names=[name])
    again = load_adapter(llama().to(torch.float16), tmp_path / "default")
    load_adapter(again, tmp_path / "b")


# ---- one adapter, not a mixture of two


def test_a_file_with_fewer_layers_than_its_name_has_is_refused(tmp_path):
    made(tmp_path / "wide", 1, [], targets=["query", "value"])
    want = made(tmp_path / "narrow", 2, [])
    model = load_adapter(bert(), tmp_path / "wide")
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    sentence = (
        r"value carries adapter 'default', for which .* has no values; load it under another name, "
        r"load_adapter\(..., name='other'\), or call adaptrank.delete_adapter\(model, 'default'\)"
    )
    with pytest.raises(UserError, match=sentence):
        load_adapter(model, tmp_path / "narrow")
    assert_unchanged(model, before, kinds)
    load_adapter(delete_adapter(model), tmp_path / "narrow")
    assert torch.equal(logits(model), want)
    # More layers than the name has are all in the file.
    load_adapter(model, tmp_path / "wide")


# ---- frozen before it is saved


def frozen(model):
    perturb(model, 0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("through", ["adapt", "a file", "a copy", "a pickle", "a larger model"])
def test_a_model_that_was_frozen_is_saved_with_its_head(through, tmp_path):
    model = adapt(bert(), ["query"], LoRA, train_modules=["classifier"])
    if through == "a file":
        save_adapter(model, tmp_path / "first")
        model = load_adapter(bert(), tmp_path / "first")
    if through == "a copy":
        model = copy.deepcopy(model)
    trains = frozen_weights(model)
    frozen(model)
    if through == "a pickle":
        model = pickle.loads(pickle.dumps(model))
    if through == "a larger model":
        model = nn.ModuleDict({"net": model})["net"]
    assert set(trained_modules(model)) == HEAD
    assert trained_tensors(model).keys() >= HEAD
    assert fingerprint(frozen_weights(model)) == fingerprint(trains)
    save_adapter(model, tmp_path / "a")
    assert set(read_adapter(tmp_path / "a")["trained_modules"]) == HEAD
    again = load_adapter(bert(), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert all(p.requires_grad for p in again.classifier.parameters())


def test_what_was_frozen_is_exported_and_is_no_reference(tmp_path):
    model = frozen(adapt(bert(), ["query"], LoRA, train_modules=["classifier"]))
    export_peft(model, tmp_path)
    again = import_peft(bert(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model))
    save_adapter(again.requires_grad_(False), tmp_path / "again")
    assert set(read_adapter(tmp_path / "again")["trained_modules"]) == HEAD
    with pytest.raises(UserError, match=r"train\(s\) whole"):
        BaseReference(model)


def test_tied_embeddings_that_were_frozen_keep_both_names(tmp_path):
    model = frozen(adapt(llama(True), ["q_proj"], LoRA, train_modules=["lm_head"]))
    assert set(trained_modules(model)) == {"model.embed_tokens.weight", "lm_head.weight"}
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(llama(True), tmp_path)), logits(model))


def test_a_second_adapter_leaves_the_record_and_a_new_start_clears_it():
    model = frozen(adapt(bert(), ["query"], LoRA, train_modules=["classifier"]))
    adapt(model, ["value"], LoRA, name="b")
    assert set(trained_modules(model)) == HEAD
    delete_adapter(model, "b")
    assert set(trained_modules(model)) == HEAD
    # The head of an adapter that is gone belongs to the base.
    delete_adapter(model)
    assert not wrapped_layers(model)
    assert not trained_modules(model)
    adapt(model, ["query"], LoRA, train_modules=["pooler.dense"])
    assert {name.split(".")[1] for name in trained_modules(model)} == {"pooler"}


def test_a_merge_clears_the_record_and_unmerge_keeps_it():
    model = adapt(bert(), ["query"], LoRA, train_modules=["classifier"])
    frozen(model)
    merge(model, keep_originals=True)
    assert set(trained_modules(unmerge(model))) == HEAD
    assert not trained_modules(merge(model))
    assert not trained_modules(adapt(model, ["query"], LoRA))


def test_an_error_gives_the_record_back(tmp_path):
    model = frozen(adapt(bert(), ["query"], LoRA, train_modules=["classifier"]))
    for arguments in ({"rank_pattern": {"nothing": 2}}, {"targets": "nothing"}):
        with pytest.raises(UserError):
            adapt(
                model, **{"targets": ["value"], "parameterization": LoRA, "name": "b"} | arguments,
                train_modules=["pooler.dense"],
            )  # fmt: skip
        assert set(trained_modules(model)) == HEAD
    plain = bert()
    with pytest.raises(UserError):
        adapt(plain, ["query"], LoRA, train_modules=["classifier"], rank_pattern={"nothing": 2})
    assert not trained_modules(plain.requires_grad_(False))


def test_a_frozen_task_module_checkpoints_its_head(tiny_bert, tmp_path):
    options = {"dtype": "fp32", "num_labels": 3}
    module = SequenceClassification(tiny_bert, [Adapter([LoRA], ["query"])], **options)
    module.configure_model()
    trained = module.trained_state().keys()
    assert "backbone.classifier.weight" in trained
    module.requires_grad_(False)
    assert module.trained_state().keys() == trained
    save_adapter(module.model, tmp_path)
    warm = SequenceClassification(tiny_bert, adapter=str(tmp_path), **options)
    warm.configure_model()
    warm.requires_grad_(False)
    assert warm.trained_state().keys() == trained
