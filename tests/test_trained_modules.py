"""Modules that train whole: a model has one of each, and a file has the values of its own."""

import copy
import pickle

import pytest
import torch
from conftest import perturb
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from adaptrank import Adapter, adapt, delete_adapter, load_adapter, merge, save_adapter, unmerge
from adaptrank._errors import UserError
from adaptrank.artifacts import frozen_weights, read_adapter, trained_modules
from adaptrank.artifacts.trainer_files import trained_tensors
from adaptrank.backbones import fingerprint
from adaptrank.interop.peft import export_peft, import_peft
from adaptrank.interop.trainers import BaseReference
from adaptrank.modules import SequenceClassification
from adaptrank.parameterizations import LoRA, wrapped_layers

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
