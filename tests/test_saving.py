"""What is saved is what was meant: enclosed models, models around models, refusals at the call."""

import copy
import json
import pickle
from functools import partial

import pytest
import torch
from conftest import METHODS, perturb
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from adaptrank.artifacts import load_adapter, merge, read_adapter, save_adapter, unmerge
from adaptrank.axes import rank_axes
from adaptrank.injection import (
    adapt,
    delete_adapter,
    describe,
    disabled,
    select_rows,
    set_enabled,
)
from adaptrank.parameterizations import LoRA, enclosed, named_layers, wrapped_layers

IDS = torch.arange(12).reshape(2, 6)


def llama(seed=0, of=LlamaForCausalLM, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=30, **changes,
    )  # fmt: skip
    return of(config).eval()


def adapted(seed=0, **changes):
    model = adapt(llama(seed, **changes), ["q_proj", "up_proj"], partial(LoRA, rank=2))
    perturb(model)
    return model


class Holder(nn.Module):
    """A module around a model, such as PEFT's."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, ids):
        return self.base_model["model"](ids)


class Task(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net = model


def checkpointed(model):
    """Put activation checkpointing around each block."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for position, block in enumerate(model.model.layers):
        model.model.layers[position] = checkpoint_wrapper(block)
    return model


def compiled_blocks(model):
    for position, block in enumerate(model.model.layers):
        model.model.layers[position] = torch.compile(block, backend="eager")
    return model


ENCLOSING = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "checkpointing": checkpointed,
    "compiled blocks": compiled_blocks,
}
AROUND = {"none": lambda model: model, "holder": Holder, "lightning": Task}


@pytest.mark.parametrize("enclose", ENCLOSING.values(), ids=ENCLOSING)
def test_modules_that_enclose_a_model_leave_no_trace(enclose, tmp_path):
    model = adapted()
    expected = model(IDS).logits
    written = save_adapter(model, tmp_path / "plain")
    axes, text, layers = list(rank_axes(model)), describe(model), list(named_layers(model))

    around = enclose(model)
    assert list(rank_axes(around)) == axes
    assert describe(around) == text
    assert list(named_layers(around)) == layers
    enclosed_too = save_adapter(around, tmp_path / "enclosed")
    assert (enclosed_too / "adapter_model.safetensors").read_bytes() == (
        written / "adapter_model.safetensors"
    ).read_bytes()

    loaded = enclose(llama())
    assert load_adapter(loaded, written) is loaded
    assert torch.equal(enclosed(loaded)(IDS).logits, expected)
    assert merge(loaded, keep_originals=True) is loaded
    assert not wrapped_layers(loaded)
    unmerge(loaded)
    assert torch.equal(enclosed(loaded)(IDS).logits, expected)
    with disabled(loaded):
        assert torch.equal(enclosed(loaded)(IDS).logits, llama()(IDS).logits)
    assert not wrapped_layers(delete_adapter(loaded))


def test_a_head_that_trains_whole_in_an_enclosed_model(tmp_path):
    model = llama(of=LlamaForSequenceClassification, num_labels=3, pad_token_id=0)
    perturb(adapt(model, ["q_proj"], LoRA, train_modules=["score"]))
    save_adapter(nn.DataParallel(compiled_blocks(model)), tmp_path)
    assert read_adapter(tmp_path)["trained_modules"] == ["score.weight"]
    fresh = llama(1, of=LlamaForSequenceClassification, num_labels=3, pad_token_id=0)
    fresh = torch.compile(fresh, backend="eager")
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.score.weight, model.score.weight)
    assert fresh.score.weight.requires_grad


@pytest.mark.parametrize("into", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("out_of", AROUND.values(), ids=AROUND)
def test_a_file_goes_from_any_module_around_a_model_into_any_other(out_of, into, tmp_path, caplog):
    model = adapted()
    save_adapter(out_of(model), tmp_path)
    fresh = llama()
    assert type(load_adapter(into(fresh), tmp_path)) is type(into(fresh))
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert not caplog.records, "the base is the same, whatever is around it"


def test_a_file_that_could_mean_two_models_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path)
    towers = nn.ModuleDict({"left": llama(), "right": llama()})
    with pytest.raises(ValueError, match="which this model does not have"):
        load_adapter(towers, tmp_path)
    assert not wrapped_layers(towers)


# ---- the base's name


def test_the_name_of_the_base_comes_from_its_configuration(tmp_path, monkeypatch):
    llama(num_labels=3, of=LlamaForSequenceClassification).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for cls, auto_class, labels in (
        (LlamaForCausalLM, "AutoModelForCausalLM", None),
        (LlamaForSequenceClassification, "AutoModelForSequenceClassification", 3),
    ):
        model = adapt(cls.from_pretrained("base"), ["q_proj"], LoRA, train_modules=[])
        base = read_adapter(save_adapter(Holder(model), tmp_path / "adapter"))["base"]
        assert base["name"] == str(tmp_path / "base"), "found from any working directory"
        assert base["auto_class"] == auto_class
        assert base.get("num_labels") == labels
        given = read_adapter(save_adapter(model, tmp_path / "given", {"name": "mine"}))["base"]
        assert given["name"] == "mine"
    plain = adapt(nn.Sequential(nn.Linear(4, 4)), "0", partial(LoRA, rank=1))
    assert read_adapter(save_adapter(plain, tmp_path / "plain"))["base"].keys() == {"fingerprint"}


def test_a_base_that_moved_away_is_one_sentence(tmp_path, capsys):
    from adaptrank.cli.dispatch import main

    llama().save_pretrained(tmp_path / "base")
    model = adapt(LlamaForCausalLM.from_pretrained(tmp_path / "base"), ["q_proj"], LoRA)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    said = capsys.readouterr().err
    assert "There is no folder" in said
    assert "Name the base with --base" in said


# ---- save_pretrained of transformers


@pytest.mark.parametrize(
    "act",
    [
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: model.model.save_pretrained(folder),
        lambda model, folder: copy.deepcopy(model).save_pretrained(folder),
        lambda model, folder: pickle.loads(pickle.dumps(model)).save_pretrained(folder),
        lambda model, folder: torch.compile(model, backend="eager").save_pretrained(folder),
    ],
    ids=["model", "inner model", "copy", "pickle", "compile"],
)
def test_save_pretrained_of_an_unmerged_model_is_refused(act, tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match=r"holds adapters.*save_adapter\(model, folder\)"):
        act(model, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is half-written"


@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.__name__)
def test_save_pretrained_is_refused_for_every_method(method, tmp_path):
    model = llama()
    layer = method(method.example())
    model.extra = layer
    with pytest.raises(ValueError, match="holds adapters"):
        model.save_pretrained(tmp_path / "out")


def test_save_pretrained_of_a_plain_model_is_as_ever(tmp_path):
    model = adapted()
    expected = model(IDS).logits
    merge(model, keep_originals=True).save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(IDS).logits, expected)
    unmerge(model)
    with pytest.raises(ValueError, match="holds adapters"):
        model.save_pretrained(tmp_path / "unmerged")
    delete_adapter(model).save_pretrained(tmp_path / "deleted")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "deleted")
    assert torch.equal(again(IDS).logits, llama()(IDS).logits)


def test_a_trainer_saves_to_resume_and_from_pretrained_cannot_mistake_it(tmp_path):
    data = [{"input_ids": (ids := torch.randint(30, (5,))), "labels": ids} for _ in range(4)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = adapted()
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert any(key.endswith("q_proj.A") for key in stored)
    for folder in ("final", "checkpoint-1"):
        with pytest.raises(Exception, match=r"adaptrank\.load_adapter\(model, folder\)"):
            LlamaForCausalLM.from_pretrained(tmp_path / folder)
    resumed = adapted()
    Trainer(resumed, arguments, train_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert torch.equal(resumed(IDS).logits, model(IDS).logits)


def test_copies_and_plain_state_dicts_keep_the_function(tmp_path):
    model = adapted(tie_word_embeddings=True)
    expected = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(IDS).logits, expected)
    fresh = adapted(seed=1, tie_word_embeddings=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS).logits, expected)
    written = save_adapter(copy.deepcopy(model), tmp_path / "copy") / "adapter_model.safetensors"
    original = save_adapter(model, tmp_path / "original") / "adapter_model.safetensors"
    assert written.read_bytes() == original.read_bytes()


# ---- what else a save may meet


def test_a_target_that_cannot_be_written_is_one_sentence(tmp_path):
    model = adapted()
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"file is a file; name a folder"):
            save_adapter(model, target)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "full" / "adapter_config.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder, where a file of the adapter belongs"):
        save_adapter(model, tmp_path / "full")


def test_foreign_files_stay(tmp_path):
    model = adapted()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    save_adapter(model, tmp_path)
    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt",
        "data",
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_an_adapter_of_another_library_is_not_replaced(tmp_path):
    model = adapted()
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="an adapter of another library"):
        save_adapter(model, tmp_path)
    config.unlink()
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="an adapter of another library"):
        save_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path)["adapters"]


def test_a_model_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        model = adapt(llama(), ["q_proj"], LoRA)
    with pytest.raises(ValueError, match="on the meta device and has no values"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_are_off_are_said(tmp_path, caplog):
    model = adapted()
    adapt(model, ["q_proj"], LoRA, name="second")
    set_enabled(model, "second")
    save_adapter(model, tmp_path)
    assert "switched off are saved too" in caplog.text
    assert "default" in caplog.text
    caplog.clear()
    save_adapter(model, tmp_path, names=["second"])
    with disabled(model):
        save_adapter(model, tmp_path)
    assert not caplog.records


def test_a_choice_of_rows_is_not_merged():
    model = adapted()
    wanted = pytest.raises(ValueError, match="on for some rows of a batch only")
    with select_rows(model, ["default", None]), wanted:
        merge(model)
    assert wrapped_layers(merge(model)) == {}


def test_names_with_dots_and_shared_heads_come_back(tmp_path):
    model = llama(tie_word_embeddings=True)
    adapt(model, ["q_proj"], LoRA, name="a.b c", train_modules=["lm_head"])
    perturb(model)
    save_adapter(model, tmp_path)
    description = read_adapter(tmp_path)
    assert description["tied"] == {"model.embed_tokens.weight": "lm_head.weight"} or description[
        "tied"
    ] == {"lm_head.weight": "model.embed_tokens.weight"}
    loaded = load_adapter(llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {layer.name for layer in wrapped_layers(loaded).values()} == {"a.b c"}


# ---- frozen modules outside of the pretrained part


def heads_named(caplog):
    return [record.getMessage() for record in caplog.records if "stay" in record.getMessage()]


def bert():
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("targets", [["query"], "all-linear"], ids=str)
def test_a_frozen_head_is_named_when_the_model_is_adapted(targets, caplog):
    for model in (bert(), torch.compile(bert(), backend="eager")):
        caplog.clear()
        adapt(model, targets, partial(LoRA, rank=2))
        (said,) = heads_named(caplog)
        assert said.startswith("classifier outside of the pretrained model stays frozen")
        assert "train_modules=['classifier']" in said


@pytest.mark.parametrize("targets", [["query"], "all-linear"], ids=str)
def test_a_head_that_trains_is_not_named(targets, caplog, tmp_path):
    model = adapt(bert(), targets, partial(LoRA, rank=2), train_modules=["classifier"])
    adapt(model, targets, partial(LoRA, rank=2), name="second", exclude=["classifier"])
    save_adapter(model, tmp_path)
    load_adapter(bert(), tmp_path)
    assert not heads_named(caplog)


def test_heads_beside_a_model_of_ones_own_are_named(caplog):
    class Own(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.encoder = llama(tie_word_embeddings=tied)
            self.value = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 1))
            self.loss = nn.CrossEntropyLoss()

    adapt(Own(tied=False), ["q_proj"], LoRA)
    (said,) = heads_named(caplog)
    assert said.startswith("value outside of the pretrained model stays")
    caplog.clear()
    adapt(Own(tied=True), ["q_proj"], LoRA, train_modules=["value"])
    adapt(llama(), ["q_proj"], LoRA)
    adapt(llama().model, ["q_proj"], LoRA)
    adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0"], partial(LoRA, rank=1))
    assert not heads_named(caplog), "output embeddings are pretrained; other models are not known"
