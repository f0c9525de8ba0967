"""Files -> rows -> batches: fields, templates, mixtures, validation, truncation, chat, classes, and what bad input is told."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from jsonargparse import ArgumentParser
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adaptrank.data import CausalLMData, ClassificationData, Source, TaskData
from adaptrank.data.base import cut, encode_segments

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_tokenizer(*, bos=False, pairs=False):
    """One token a byte, whose end is also its padding; perhaps with a beginning, or with BERT's marks."""
    names = ["<end>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[]))
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [("<s>", 1), ("<end>", 0)]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <end>", pair="<s> $A <end> $B:1 <end>:1", special_tokens=special
        )
    given = {"eos_token": "<end>", "pad_token": "<end>", "bos_token": "<s>", "chat_template": CHAT}
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **given)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test leaves anything in the user's cache, or is counted on the Hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ready(data: TaskData, tokenizer=None, stage=None):
    data.tokenizer = tokenizer or tiny_tokenizer()
    data.setup(stage)
    return data


def sums(n, start=0):
    rows = range(start, start + n)
    return [{"prompt": f"Q: {i} + 1\nA:", "completion": f" {i + 1}", "answer": f"{i + 1}"} for i in rows]


def trained(data, example):
    labels = example["labels"]
    return data.tokenizer.decode(labels[labels != -100])


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "sums/train.jsonl", sums(10))
    write(tmp_path / "sums/validation.jsonl", sums(4, 100))
    return tmp_path / "sums"


def test_a_folder_is_enough(folder):
    data = ready(CausalLMData(str(folder), batch_size=4, eval_batch_size=4))
    assert [len(data.examples(s)) for s in ("train", "val", "test")] == [10, 4, 4]
    assert data.num_classes is None
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "prompt_ids", "prompt_mask", "answers"}
    assert batch["answers"] == ["101", "102", "103", "104"]
    assert trained(data, data.examples("train")[0]) == " 1<end>"
    assert next(iter(data.predict_dataloader()))["prompts"][0] == "Q: 100 + 1\nA:"
    assert set(next(iter(data.train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file(ending, tmp_path):
    path = str(tmp_path / f"some.{ending}")
    table = Dataset.from_list(sums(10))
    if ending == "parquet":
        table.to_parquet(path)
    elif "json" in ending:
        table.to_json(path)
    else:
        table.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    data = ready(CausalLMData(path, val_fraction=0.2))
    assert [len(data.examples(s)) for s in ("train", "val")] == [8, 2]
    assert data.examples("val")[0]["answer"].isdigit()


def test_a_pattern_of_files_and_a_folder_of_parts(tmp_path):
    for k in range(3):
        write(tmp_path / f"parts/part{k}.jsonl", sums(5, 10 * k))
    assert len(CausalLMData(str(tmp_path / "parts/part[01].jsonl")).rows("train")) == 9
    assert len(CausalLMData(str(tmp_path / "parts")).rows("train")) == 13  # two are held back for validation


def test_fields_by_column_and_by_template(tmp_path):
    rows = [{"q": f"{i}?", "more": {"a": [f"{i}!"]}, "prompt": "wrong"} for i in range(4)]
    fields = {"prompt": "Question: {q}\nAnswer:", "completion": " {more[a][0]}", "answer": "{more[a][0]}"}
    data = CausalLMData(write(tmp_path / "a.jsonl", rows), **fields)
    assert data.rows("train")[0].keys() == {"prompt", "completion", "answer"}
    assert {r["prompt"] + r["completion"] for s in ("train", "val") for r in data.rows(s)} == {
        f"Question: {i}?\nAnswer: {i}!" for i in range(4)
    }
    own = CausalLMData([Source(write(tmp_path / "a.jsonl", rows), prompt="q")], **fields)
    assert own.rows("val")[0]["prompt"].endswith("?"), "a source's own field goes before the module's"


def test_validation_is_held_back_by_the_seed_and_never_trained_on(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(50))

    def split(seed):
        return {s: [r["answer"] for r in CausalLMData(path, seed=seed).rows(s)] for s in ("train", "val")}

    assert split(1) == split(1) != split(2)
    assert len(split(1)["val"]) == 5
    assert not set(split(1)["train"]) & set(split(1)["val"])


def test_sources_are_mixed_by_weight(tmp_path):
    a, b = write(tmp_path / "a.jsonl", sums(10)), write(tmp_path / "b.jsonl", sums(20, 100))
    sources = [Source(a, weight=2.5), Source(b, weight=0.5)]
    data = CausalLMData(sources, validation=write(tmp_path / "v.jsonl", sums(3, 500)))
    rows = [int(r["answer"]) for r in data.rows("train")]
    assert rows == [int(r["answer"]) for r in data.rows("train")]
    assert len(rows) == 25 + 10
    assert {rows.count(n) for n in range(1, 11)} == {2, 3}
    assert len(data.rows("val")) == 3
    shared = CausalLMData(sources, val_fraction=0.2)
    assert len(shared.rows("val")) == 2 + 4, "validation knows no weight"
    assert len(shared.rows("train")) == 20 + 8
    with pytest.raises(ValueError, match="weight=0"):
        CausalLMData([Source(a, weight=0)]).rows("train")


def test_limits_keep_the_first_after_a_shuffle(folder):
    data = ready(CausalLMData(str(folder), limit_train=3, limit_val=2))
    assert [len(data.examples(s)) for s in ("train", "val")] == [3, 2]
    kept = [trained(data, e) for e in data.examples("train")]
    assert kept != [" 1<end>", " 2<end>", " 3<end>"]
    assert kept == [trained(data, e) for e in ready(CausalLMData(str(folder), limit_train=3)).examples("train")]


def test_truncation_keeps_the_completion_and_is_reported(tmp_path, caplog):
    rows = [{"prompt": "x" * 50 + "end:", "completion": " yes"}, {"prompt": "short:", "completion": " no"}]
    rows += [{"prompt": "p:", "completion": " " + "y" * 60}]
    path = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING, "adaptrank"):
        data = ready(CausalLMData(path, path, max_length=20), tiny_tokenizer(bos=True), "fit")
    a, b, c = data.examples("train")
    assert data.tokenizer.decode(a["input_ids"]) == "<s>" + "x" * 10 + "end: yes<end>"
    assert trained(data, a) == " yes<end>"
    assert len(b["input_ids"]) == 1 + 6 + 3 + 1
    assert data.tokenizer.decode(c["input_ids"]) == "<s> " + "y" * 18, "one token of context is left"
    assert data.truncated == {"train": 2, "val": 2}
    text = "2 of 3 train rows exceed max_length=20: 1 prompts cut from the left, 1 completions cut from the right."
    assert text in caplog.text
    assert data.tokenizer.decode(data.examples("val")[0]["prompt_ids"]) == "<s>" + "x" * 15 + "end:"


def test_cut_keeps_what_the_last_completion_needs():
    assert cut([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], 3, None) == ([3, 4, 5], [-100, 4, 5], "prompt")
    assert cut([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], 2, None) == ([3, 4], [-100, 4], "completion")
    assert cut([7, 2, 3, 4], [-100, -100, -100, 4], 3, 7) == ([7, 3, 4], [-100, -100, 4], "prompt")
    assert cut([1, 2], [1, 2], 2, None) == ([1, 2], [1, 2], "")
    assert cut([1, 2, 3], [1, 2, 3], 2, None) == ([1, 2], [1, 2], "completion")


def test_the_prompt_is_tokenized_as_generation_sees_it():
    """Where prompt and completion would merge into one token, they are told apart; elsewhere the text is tokenized whole."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert encode_segments(merging, [[("a", False), ("b", True)]], special=True) == [([0, 1], [-100, 1])]
    assert encode_segments(merging, [[("a", False), ("ab", True)]], special=True) == [([0, 2], [-100, 2])]


@pytest.mark.parametrize("label", [1, "B", "no"])
def test_choices(tmp_path, label):
    rows = [{"prompt": f"{i}?", "choices": ["yes", "no", "maybe so"], "label": label} for i in range(4)]
    data = ready(CausalLMData(write(tmp_path / "a.jsonl", rows), write(tmp_path / "v.jsonl", rows), eval_batch_size=4))
    assert trained(data, data.examples("train")[0]) == " no<end>"
    batch = next(iter(data.val_dataloader()))["choices"]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "group", "characters", "target"}
    assert batch["group"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert batch["characters"].tolist() == [3, 2, 8] * 4
    assert batch["target"].tolist() == [1] * 4
    texts = [data.tokenizer.decode(ids[ids != -100]) for ids in batch["labels"]]
    assert texts == [" yes", " no", " maybe so"] * 4


def test_columns_that_only_some_rows_have(tmp_path, caplog):
    rows = [*sums(2), {"prompt": "Name it:", "completion": " this"}]
    path = write(tmp_path / "a.jsonl", rows)
    data = ready(CausalLMData(path, path))
    assert "2 of 3 val rows have `answer`, so there is no exact match." in caplog.text
    assert set(next(iter(data.val_dataloader()))) == {"input_ids", "attention_mask", "labels"}


def test_chat_trains_on_the_reply_and_its_end(folder):
    data = ready(CausalLMData(str(folder), chat=True, eval_batch_size=2))
    example = data.examples("train")[0]
    opening = "<s>user\nQ: 0 + 1\nA:<end>\n<s>assistant\n"
    assert data.tokenizer.decode(example["input_ids"]) == opening + "1<end>"
    assert trained(data, example) == "1<end>"
    batch = next(iter(data.val_dataloader()))
    assert data.tokenizer.decode(batch["prompt_ids"][0]) == opening.replace("0 + 1", "100 + 1")
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ready(CausalLMData(str(folder), chat=True), bare)


def test_chat_choices_have_no_end(tmp_path):
    rows = [{"prompt": f"{i}?", "choices": ["yes", "no"], "label": 0} for i in range(2)]
    data = ready(CausalLMData(write(tmp_path / "a.jsonl", rows), write(tmp_path / "v.jsonl", rows), chat=True))
    labels = next(iter(data.val_dataloader()))["choices"]["labels"]
    assert [data.tokenizer.decode(ids[ids != -100]) for ids in labels] == ["yes", "no"] * 2


def test_conversations(tmp_path):
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"), ("assistant", "Ciao")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]}] * 2
    data = ready(CausalLMData(write(tmp_path / "a.jsonl", rows), write(tmp_path / "v.jsonl", rows)))
    assert trained(data, data.examples("train")[0]) == "Yo<end>Ciao<end>"
    prompt = data.tokenizer.decode(data.examples("val")[0]["prompt_ids"])
    assert prompt.startswith("<s>system\nBe short.<end>\n")
    assert prompt.endswith("<s>user\nBye<end>\n<s>assistant\n")
    mute = [{"messages": [{"role": "user", "content": "Hi"}]}] * 2
    with pytest.raises(ValueError, match="no assistant turn"):
        ready(CausalLMData(write(tmp_path / "b.jsonl", mute)))
    asked = CausalLMData(str(tmp_path / "a.jsonl"), predict=write(tmp_path / "p.jsonl", mute))
    assert ready(asked, stage="predict").examples("predict")[0]["prompt"] == "<s>user\nHi<end>\n<s>assistant\n"


def test_prediction_needs_prompts_only(folder, tmp_path):
    path = write(tmp_path / "ask.jsonl", [{"prompt": "Q: 7 + 1\nA:"}, {"prompt": "Q: 1\nA:"}])
    data = ready(CausalLMData(str(folder), predict=path), stage="predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["prompts"] == ["Q: 7 + 1\nA:", "Q: 1\nA:"]
    assert batch["prompt_mask"].tolist()[1][:4] == [0, 0, 0, 0]


def reviews(n):
    return [{"text": f"film {i}", "label": i % 3} for i in range(n)]


def test_classes_are_named_beside_the_file(tmp_path):
    folder = tmp_path / "reviews"
    write(folder / "train.jsonl", reviews(9)), write(folder / "validation.jsonl", reviews(3))
    (folder / "labels.json").write_text('["bad", "fair", "good", "great"]')
    for path in (str(folder), str(folder / "train.jsonl")):
        data = ready(ClassificationData(path, batch_size=9), stage="fit")
        assert data.class_names == ["bad", "fair", "good", "great"]
        assert data.num_classes == 4
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert sorted(
        ready(ClassificationData(str(folder), batch_size=9)).examples("val")[i]["label"] for i in range(3)
    ) == [0, 1, 2]


def test_classes_are_the_sorted_labels_where_nothing_names_them(tmp_path):
    names = [{"text": "t", "label": name} for name in ("no", "yes", "maybe")] * 2
    data = ready(ClassificationData(write(tmp_path / "a.jsonl", names), write(tmp_path / "v.jsonl", names)))
    assert data.class_names == ["maybe", "no", "yes"]
    assert [e["label"] for e in data.examples("train")] == [1, 2, 0, 1, 2, 0]
    stars = [{"text": "t", "label": k} for k in (5, 1, 3)]
    data = ready(ClassificationData(write(tmp_path / "b.jsonl", stars), write(tmp_path / "w.jsonl", stars)))
    assert data.class_names == ["1", "3", "5"]
    assert [e["label"] for e in data.examples("val")] == [2, 0, 1]


def test_pairs_have_types(tmp_path):
    rows = [{"a": "one", "b": "two", "y": "same" if i % 2 else "other"} for i in range(4)]
    path = write(tmp_path / "a.jsonl", rows)
    fields = {"text": "a", "text_pair": "b", "label": "y"}
    data = ready(ClassificationData(path, path, batch_size=4, max_length=8, **fields), tiny_tokenizer(pairs=True))
    batch = next(iter(data.val_dataloader()))
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1][: batch["token_type_ids"].shape[1]]
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert data.truncated["train"] == 4
    assert data.class_names == ["other", "same"]
    assert "labels" not in next(iter(ready(ClassificationData(path, predict=path, **fields)).predict_dataloader()))


def test_yaml_is_short_and_survives_being_saved(folder, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=TaskData)
    short = f"data: {{class_path: CausalLMData, init_args: {{sources: {folder}, max_length: 99, chat: false}}}}"
    long = f"""
data:
  class_path: adaptrank.data.CausalLMData
  init_args:
    sources:
      - {{path: {folder}, weight: 2, prompt: "Question: {{answer}}\\nAnswer:"}}
      - {{path: {folder}}}
    validation: [{{path: {folder}, split: "validation[:2]"}}]
"""
    for text, rows in ((short, 10), (long, 30)):
        config = parser.parse_string(text)
        again = parser.parse_string(parser.dump(config))
        assert again == config
        data = parser.instantiate(again).data
        assert len(data.rows("train")) == rows
    assert data.rows("train")[0]["prompt"] == "Question: 1\nAnswer:"
    assert len(data.rows("val")) == 2


def problem(data, stage="fit"):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ready(data, stage=stage)
    return str(caught.value)


def test_missing_files_are_answered_with_the_nearest(folder, tmp_path):
    assert "did you mean 'sums'?" in problem(CausalLMData(str(tmp_path / "sum")))
    assert "did you mean 'train.jsonl'?" in problem(CausalLMData(str(folder / "trains.jsonl")))
    assert "does not exist either" in problem(CausalLMData(str(tmp_path / "no/where.csv")))
    assert "No file matches" in problem(CausalLMData(str(tmp_path / "*.csv")))
    (tmp_path / "empty").mkdir()
    assert "has no data file" in problem(CausalLMData(str(tmp_path / "empty")))
    assert "no 'extra' split; it holds ['train.jsonl'" in problem(CausalLMData([Source(str(folder), split="extra")]))


def test_missing_columns_are_answered_with_those_there_are(folder, tmp_path):
    said = problem(CausalLMData(str(folder), prompt="{promt}"))
    assert "no column 'promt', only ['prompt', 'completion', 'answer']; did you mean 'prompt'?" in said
    assert "prompt: 'Q {' is no format string" in problem(CausalLMData(str(folder), prompt="Q {"))
    path = write(tmp_path / "a.jsonl", [{"question": "q", "reply": "r"}] * 3)
    assert 'for example prompt: "{question}"' in problem(CausalLMData(path))
    assert "no column 'completion'" in problem(CausalLMData(path, prompt="question"))
    path = write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}] * 2)
    assert "Row 1 of" in problem(CausalLMData(path))


def test_labels_outside(tmp_path):
    rows = [{"prompt": "q", "choices": ["a", "b"], "label": 2}] * 3
    assert "label 2 is none of its 2 choices; use 0 to 1" in problem(CausalLMData(write(tmp_path / "a.jsonl", rows)))
    good, bad = write(tmp_path / "t.jsonl", reviews(6)), write(tmp_path / "v.jsonl", [{"text": "x", "label": 7}])
    assert "label 7 is none of the 3 classes ['0', '1', '2']" in problem(ClassificationData(good, bad))
    assert "label 2 is none of the 2 classes" in problem(ClassificationData(good, classes=["a", "b"]))
    named = write(tmp_path / "n.jsonl", [{"text": "x", "label": "positiv"}] * 3)
    assert "did you mean 'positive'?" in problem(ClassificationData(named, classes=["negative", "positive"]))


def test_empty_splits_and_shares(folder, tmp_path):
    empty = tmp_path / "none.csv"
    empty.write_text("prompt,completion\n")
    assert f"No rows come from '{empty}'" in problem(CausalLMData(str(folder), validation=str(empty)))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": ')
    assert "cannot be read as json" in problem(CausalLMData(str(broken)))
    one = write(tmp_path / "one.jsonl", sums(1))
    assert "too few to hold 1 back" in problem(CausalLMData(one))
    with pytest.raises(ValueError, match=r"val_fraction=1\.5"):
        CausalLMData(str(folder), val_fraction=1.5)
    with pytest.raises(ValueError, match="`sources` is empty"):
        CausalLMData([])


def test_progress_bars_are_as_they_were(folder):
    from datasets.utils.tqdm import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    CausalLMData(str(folder)).rows("train")
    assert are_progress_bars_disabled() is before


def test_batches_are_long(folder):
    data = ready(CausalLMData(str(folder)))
    assert all(t.dtype == torch.long for t in next(iter(data.train_dataloader())).values())
