import json
import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torchmetrics.functional.text import bleu_score, chrf_score
from transformers import AutoModelForSeq2SeqLM

from adaptrank import load_adapter, save_adapter
from adaptrank.cli import main
from adaptrank.data import GeneratedDates, Seq2SeqData
from adaptrank.interop.peft import export_peft
from adaptrank.modules import Adapter, Seq2Seq
from adaptrank.parameterizations import HyperAdapt, LoRA, wrapped_layers
from adaptrank.testing import perturb

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
ROWS = [{"source": "a b c", "target": "cba"}, {"source": "x", "target": "xyz 12"}]


def rewriter(folder, *nest, **arguments):
    nest = nest or (partial(LoRA, rank=2),)
    arguments = {"dtype": "fp32", "max_new_tokens": 5, **arguments}
    return Seq2Seq(folder, [Adapter(list(nest))], **arguments)


def rows_data(tmp_path, rows=ROWS, **arguments):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Seq2SeqData(str(file), validation=str(file), **{"batch_size": 2, **arguments})


def prepared(data, module, stage="fit"):
    data.tokenizer = module.tokenizer
    data.setup(stage)
    return data


@pytest.fixture(params=["t5", "bart"])
def either(request, tiny_t5, tiny_bart):
    return {"t5": tiny_t5, "bart": tiny_bart}[request.param]


# ---- the loss


def test_the_loss_is_that_of_the_model_and_leaves_padding_out(either, tmp_path):
    module = rewriter(either)
    data = prepared(rows_data(tmp_path), module)
    module.configure_model()
    perturb(module.model)
    module.eval()
    batch = data.collate("train")(data.examples("train"))
    assert (batch["labels"] == -100).any()
    losses = module(batch)
    assert len(losses) == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(losses.mean(), module.model(**batch).loss)
    alone = [module(data.collate("train")([example])) for example in data.examples("train")]
    torch.testing.assert_close(losses, torch.cat(alone))


def test_the_evaluation_weighs_tokens_not_batches(tiny_t5, tmp_path):
    data = rows_data(tmp_path, [*ROWS, {"source": "q", "target": "a longer one"}])
    module = rewriter(tiny_t5)
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    batches = [data.collate("val")([example]) for example in data.examples("val")]
    losses = torch.cat([module(batch, ("sources", "targets")) for batch in batches])
    assert result["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)


def test_batches_of_another_task_are_refused(tiny_t5):
    from adaptrank.data import GeneratedQuestions

    data = GeneratedQuestions(batch_size=2, train_size=6, val_size=6)
    with pytest.raises(ValueError, match=r"tokens of a target for each of 2 sources.*Seq2SeqData"):
        Trainer(**QUIET, max_steps=1).fit(rewriter(tiny_t5), datamodule=data)


# ---- data


def test_targets_end_and_long_ones_are_cut_before_their_end(tiny_t5, tmp_path, caplog):
    module = rewriter(tiny_t5)
    with caplog.at_level(logging.WARNING):
        data = prepared(rows_data(tmp_path, max_target_length=4, max_length=4), module)
    ids = module.tokenizer.convert_tokens_to_ids
    end = module.tokenizer.eos_token_id
    labels = [example["target_ids"].tolist() for example in data.examples("train")]
    assert labels == [[*ids(list("cba")), end], [*ids(list("xyz")), end]]
    sources = [example["input_ids"].tolist() for example in data.examples("train")]
    assert sources == [[*ids(list("a b")), end], [*ids(["x"]), end]]
    said = "2 of 2 train rows exceed max_length=4: 1 sources cut, 1 targets cut"
    assert said in caplog.text


def test_a_tokenizer_that_ends_no_text_gets_an_end_for_targets(tiny_bert, tmp_path):
    """Word-level tokenizers without a template have no end."""
    from transformers import AutoTokenizer

    data = rows_data(tmp_path, [{"source": "How many", "target": "1 2 3"}], max_target_length=3)
    data.tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    data.setup("fit")
    tokens = data.tokenizer.convert_ids_to_tokens(data.examples("val")[0]["target_ids"].tolist())
    assert tokens == ["1", "2", "<eos>"]


def test_prefix_and_template_make_the_sources_and_are_recorded(tiny_t5, tmp_path):
    rows = [{"text": {"en": "a"}, "sum": "b"}]
    data = rows_data(tmp_path, rows, source="{text[en]}!", target="sum", prefix="do {it}: ")
    module = rewriter(tiny_t5)
    (example,) = prepared(data, module).examples("val")
    assert example["source"] == "do {it}: a!"
    assert data.conventions()["prompt"] == "do {{it}}: {text[en]}!"
    whole = rows_data(tmp_path, ROWS, prefix="do: ")
    assert prepared(whole, module).conventions()["prompt"] == "do: {source}"
    assert "prompt" not in prepared(rows_data(tmp_path), module).conventions()


def test_generated_dates_are_right_and_share_no_day():
    import datetime

    data = GeneratedDates(train_size=300, val_size=200)
    days = {}
    for split in ("train", "val"):
        rows = data.rows(split)
        days[split] = {row["target"] for row in rows}
        for row in rows:
            date = datetime.date.fromisoformat(row["target"])
            assert str(date.year) in row["source"]
            assert str(date.day) in row["source"]
            assert f"{date:%B}"[:3] in row["source"]
    assert not days["train"] & days["val"]
    forms = {"21st": 21, "2nd": 2, "13th": 13, "3rd": 3, "11th": 11}
    from adaptrank.data.generated_dates import ordinal

    assert {ordinal(day): day for day in forms.values()} == forms


# ---- generation


class Parrot(Seq2Seq):
    """Writes the same text for every source."""

    def complete(self, input_ids, attention_mask=None):
        return ["the  cat sat on it"] * len(input_ids)


def test_metrics_of_texts_are_those_of_torchmetrics(tiny_t5, tmp_path):
    targets = ["the cat sat on it", "the cat sat on the mat today"]
    rows = [{"source": "a", "target": target} for target in targets]
    metrics = [
        "exact_match",
        "bleu",
        "chrf",
        "rouge",
        {"class_path": "torchmetrics.text.EditDistance", "init_args": {"reduction": "sum"}},
    ]
    module = Parrot(tiny_t5, [Adapter([LoRA])], dtype="fp32", metrics=metrics)
    data = rows_data(tmp_path, rows)
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    said, references = ["the  cat sat on it"] * 2, [[target] for target in targets]
    assert result["exact_match"] == 0.5
    assert result["bleu"] == pytest.approx(float(bleu_score(said, references)))
    assert result["chrf"] == pytest.approx(float(chrf_score(said, references)))
    assert result["EditDistance"] == 1 + 13
    assert result["rouge1"] == pytest.approx((1 + 2 * 4 / 12) / 2, abs=1e-4)
    assert {"rouge2", "rougeL"} <= result.keys()
    assert "rouge1_precision" not in result


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metrics": ["blue"]}, "no metric of texts 'blue'. Did you mean 'bleu'"),
        ({"metrics": ["bleu", "bleu"]}, "Two metrics are called 'bleu'"),
        ({"metrics": [{"class_path": "torchmetrics.MeanSquaredError"}]}, "does not take texts"),
        ({"metrics": [{"class_path": "BLEUScore", "init_args": {"n": 2}}]}, "cannot be made"),
        ({"generation": {"num_beam": 4}}, "no 'num_beam'. Did you mean 'num_beams'"),
        ({"generation": {"num_beams": 0}}, "num_beams"),
        ({"generation": {"length_penalty": float("nan")}}, "length_penalty=nan is too large"),
        ({"generation": {"max_new_tokens": 4}}, "Set model.max_new_tokens instead"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_mistakes_are_refused_before_a_backbone_is_looked_for(arguments, said):
    with pytest.raises(ValueError, match=said):
        Seq2Seq("nowhere", [Adapter([LoRA])], **arguments)


def test_texts_are_generated_as_transformers_does(either):
    module = rewriter(either, generation={"num_beams": 3, "length_penalty": 0.5})
    module.configure_model()
    perturb(module.model)
    module.eval()
    encoded = module.tokenizer(["abc", "q"], padding=True, return_tensors="pt")
    texts = module.complete(encoded["input_ids"], encoded["attention_mask"])
    expected = module.model.generate(
        **{key: encoded[key] for key in ("input_ids", "attention_mask")},
        num_beams=3,
        length_penalty=0.5,
        max_new_tokens=5,
        do_sample=False,
    )
    assert texts == module.tokenizer.batch_decode(expected, skip_special_tokens=True)
    (alone,) = module.complete(encoded["input_ids"][1:, :2])
    assert alone == texts[1]


def test_a_backbone_without_the_task_is_refused_by_its_kind(tiny_llama, tiny_t5):
    from adaptrank.modules import MultipleChoice

    with pytest.raises(ValueError, match=r"'llama', .* of the task seq to seq causal lm"):
        _ = Seq2Seq(tiny_llama, [Adapter([LoRA])]).tokenizer
    with pytest.raises(ValueError, match=r"'t5', .* of the task multiple choice"):
        _ = MultipleChoice(tiny_t5, [Adapter([LoRA])]).tokenizer


def test_float16_of_a_t5_is_warned_of(tiny_t5, caplog):
    with caplog.at_level(logging.WARNING, "adaptrank"):
        rewriter(tiny_t5, dtype="fp16").configure_model()
    assert "leave the range of float16" in caplog.text


def test_a_t5_trains_in_bfloat16_with_checkpointing(tiny_t5, tmp_path):
    module = rewriter(tiny_t5, HyperAdapt, LoRA, dtype="bf16", gradient_checkpointing=True)
    trainer = Trainer(**QUIET, max_steps=2, enable_checkpointing=False)
    trainer.fit(module, datamodule=rows_data(tmp_path))
    assert torch.isfinite(trainer.callback_metrics["loss"])


# ---- adapters


def test_adapters_stand_on_encoder_decoder_and_cross_attention(tiny_t5, tiny_bart):
    module = rewriter(tiny_t5)
    module.configure_model()
    paths = set(wrapped_layers(module.model))
    kinds = {path.rpartition(".")[2] for path in paths}
    assert kinds == {"q", "k", "v", "o", "wi", "wo"}
    assert "encoder.block.0.layer.0.SelfAttention.q" in paths
    assert "decoder.block.1.layer.1.EncDecAttention.v" in paths
    module = rewriter(tiny_bart)
    module.configure_model()
    paths = set(wrapped_layers(module.model))
    assert "model.decoder.layers.0.encoder_attn.k_proj" in paths
    assert not any(path.endswith(("lm_head", "shared")) for path in paths)


def test_rows_of_layers_leave_out_the_padding_of_the_encoder_alone(either, tmp_path):
    """A rank initializer reads the inputs of layers. Here sources and targets are equally long."""
    from adaptrank.allocation.initial.layer_inputs import watch
    from adaptrank.axes import rank_axes

    rows = [{"source": "abc", "target": "xyz"}, {"source": "a", "target": "x"}]
    module = rewriter(either)
    data = prepared(rows_data(tmp_path, rows), module)
    module.configure_model()
    batch = data.collate("train")(data.examples("train"))
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 4)
    counts = {}
    handles = watch(
        module.model, rank_axes(module.model), lambda key, rows, _: counts.update({key: len(rows)})
    )
    with torch.no_grad():
        module(batch)
    for handle in handles:
        handle.remove()
    reads_encoder = {"EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj"}
    reads_encoder.add("encoder_attn.v_proj")
    for key, count in counts.items():
        path = key.partition(":")[0]
        is_encoded = path.removeprefix("model.").startswith("encoder.")
        is_encoded = is_encoded or path.endswith(tuple(reads_encoder))
        assert count == (6 if is_encoded else 8), path


def test_a_shared_embedding_trains_once_and_is_saved(either, tmp_path):
    module = rewriter(either, train_modules=["shared"])
    trainer = Trainer(**QUIET, max_steps=2, enable_checkpointing=False)
    trainer.fit(module, datamodule=rows_data(tmp_path))
    embedding = module.model.get_input_embeddings().weight
    assert module.model.get_output_embeddings().weight is embedding
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    again = load_adapter(AutoModelForSeq2SeqLM.from_pretrained(either), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 1]])
    module.eval()
    torch.testing.assert_close(
        again.eval()(input_ids=ids, labels=ids).logits,
        module.model(input_ids=ids, labels=ids).logits,
    )


def test_peft_loads_an_exported_adapter(either, tmp_path):
    peft = pytest.importorskip("peft")
    module = rewriter(either)
    module.configure_model()
    perturb(module.model)
    base = {"name": either, "auto_class": module.auto_class}
    export_peft(module.model, tmp_path / "peft", base)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(either), tmp_path / "peft"
    )
    ids = torch.tensor([[5, 6, 7, 1]])
    module.eval()
    torch.testing.assert_close(
        loaded.eval()(input_ids=ids, labels=ids).logits,
        module.model(input_ids=ids, labels=ids).logits,
    )


@pytest.mark.parametrize(
    "settings", [{"num_beams": "4"}, {"num_beams": 1 << 20}, {"custom_generate": 1}, [4]]
)
def test_a_file_carries_no_other_settings_of_generation(tiny_t5, tmp_path, settings):
    from adaptrank.artifacts import record_conventions

    module = rewriter(tiny_t5)
    module.configure_model()
    record_conventions(module.model, {"stop_tokens": {}})
    recorded = module.model.__dict__["_adaptrank_conventions"]
    recorded["default"]["generation"] = settings
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    with pytest.raises(ValueError, match=r"conventions\.generation are no settings"):
        load_adapter(base, tmp_path / "adapter")


def test_generate_writes_by_adapter_and_by_merged_model(tiny_t5, tmp_path, capsys):
    data = rows_data(tmp_path, prefix="do: ")
    module = rewriter(tiny_t5, max_new_tokens=6, generation={"num_beams": 2})
    trainer = Trainer(**QUIET, max_steps=2, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    perturb(module.model)
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    assert "generate:" in capsys.readouterr().out
    written = []
    for folder in ("adapter", "merged"):
        command = ["generate", str(tmp_path / folder), "--prompt", "a b c", "--json"]
        main([*command, "--max_new_tokens", "6", "--dtype", "fp32"])
        written.append(json.loads(capsys.readouterr().out))
    encoded = module.tokenizer(["do: a b c"], return_tensors="pt")
    module.eval()
    (text,) = module.complete(encoded["input_ids"])
    assert written == [{"prompt": "do: a b c", "completion": text}] * 2
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config["num_beams"] == 2
