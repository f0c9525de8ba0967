"""Files -> rows -> batches, and the errors of bad input.

Fields, templates, mixtures, validation, truncation, chat, classes.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from jsonargparse import ArgumentParser
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adaptrank._errors import UserError
from adaptrank.cli import main
from adaptrank.cli.train import AdaptrankCLI
from adaptrank.data import (
    CausalLMData,
    ClassificationData,
    LabelTask,
    MultipleChoiceData,
    Seq2SeqData,
    Source,
    TaskData,
    TokenClassificationData,
)
from adaptrank.data.segments import cut, encode_segments

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_tokenizer(*, bos=False, pairs=False):
    """One token per byte, with the end as padding, perhaps with a beginning or BERT's marks."""
    names = ["<end>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[]))
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [("<s>", 1), ("<end>", 0)]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=special
        )
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <end>", pair="<s> $A <end> $B:1 <end>:1", special_tokens=special
        )
    given = {"eos_token": "<end>", "pad_token": "<end>", "bos_token": "<s>", "chat_template": CHAT}
    inputs = (
        ["input_ids", "token_type_ids", "attention_mask"]
        if pairs
        else ["input_ids", "attention_mask"]
    )
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
    return [
        {"prompt": f"Q: {i} + 1\nA:", "completion": f" {i + 1}", "answer": f"{i + 1}"} for i in rows
    ]


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
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "labels",
        "prompt_ids",
        "prompt_mask",
        "answers",
    }
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
    assert (
        len(CausalLMData(str(tmp_path / "parts")).rows("train")) == 13
    )  # two are held back for validation


def test_fields_by_column_and_by_template(tmp_path):
    rows = [{"q": f"{i}?", "more": {"a": [f"{i}!"]}, "prompt": "wrong"} for i in range(4)]
    fields = {
        "prompt": "Question: {q}\nAnswer:",
        "completion": " {more[a][0]}",
        "answer": "{more[a][0]}",
    }
    data = CausalLMData(write(tmp_path / "a.jsonl", rows), **fields)
    assert data.rows("train")[0].keys() == {"prompt", "completion", "answer"}
    assert {r["prompt"] + r["completion"] for s in ("train", "val") for r in data.rows(s)} == {
        f"Question: {i}?\nAnswer: {i}!" for i in range(4)
    }
    own = CausalLMData([Source(write(tmp_path / "a.jsonl", rows), prompt="q")], **fields)
    assert own.rows("val")[0]["prompt"].endswith("?"), (
        "a source's own field goes before the module's"
    )


def test_validation_is_held_back_by_the_seed_and_never_trained_on(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(50))

    def split(seed):
        return {
            s: [r["answer"] for r in CausalLMData(path, seed=seed).rows(s)]
            for s in ("train", "val")
        }

    assert split(1) == split(1) != split(2)
    assert len(split(1)["val"]) == 5
    assert not set(split(1)["train"]) & set(split(1)["val"])


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (CausalLMData, {"prompt": "p", "completion": " c"}),
        (ClassificationData, {"text": "t", "label": "a"}),
        (MultipleChoiceData, {"question": "q", "choices": ["x", "y"], "label": "A"}),
        (Seq2SeqData, {"source": "s", "target": "t"}),
        (TokenClassificationData, {"tokens": ["w"], "tags": ["O"]}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("share", [0.2, "0.2"])
def test_a_number_for_validation_is_the_share_that_is_held_back(tmp_path, kind, row, share):
    data = kind(write(tmp_path / "a.jsonl", [row] * 20), validation=share)
    assert (len(data.rows("train")), len(data.rows("val"))) == (16, 4)
    with pytest.raises(UserError, match=r"validation=1\.5 is not a share\. Use a number between 0"):
        kind("a.jsonl", validation=1.5)
    with pytest.raises(UserError, match="validation=2 is not a share"):
        kind("a.jsonl", validation=2)


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
    assert kept == [
        trained(data, e) for e in ready(CausalLMData(str(folder), limit_train=3)).examples("train")
    ]


def test_truncation_keeps_the_completion_and_is_reported(tmp_path, caplog):
    rows = [
        {"prompt": "x" * 50 + "end:", "completion": " yes"},
        {"prompt": "short:", "completion": " no"},
    ]
    rows += [{"prompt": "p:", "completion": " " + "y" * 60}]
    path = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING, "adaptrank"):
        data = ready(CausalLMData(path, path, max_length=20), tiny_tokenizer(bos=True), "fit")
    a, b, c = data.examples("train")
    assert data.tokenizer.decode(a["input_ids"]) == "<s>" + "x" * 10 + "end: yes<end>"
    assert trained(data, a) == " yes<end>"
    assert len(b["input_ids"]) == 1 + 6 + 3 + 1
    assert data.tokenizer.decode(c["input_ids"]) == "<s> " + "y" * 18, (
        "one token of context is left"
    )
    assert data.truncated == {"train": 2, "val": 2}
    text = (
        "2 of 3 train rows exceed max_length=20: 1 prompts cut from the left, "
        "1 completions cut from the right."
    )
    assert text in caplog.text
    assert data.tokenizer.decode(data.examples("val")[0]["prompt_ids"]) == "<s>" + "x" * 15 + "end:"


def test_cut_keeps_what_the_last_completion_needs():
    assert cut([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], 3, None) == (
        [3, 4, 5],
        [-100, 4, 5],
        "prompt",
    )
    assert cut([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], 2, None) == ([3, 4], [-100, 4], "completion")
    assert cut([7, 2, 3, 4], [-100, -100, -100, 4], 3, 7) == ([7, 3, 4], [-100, -100, 4], "prompt")
    assert cut([1, 2], [1, 2], 2, None) == ([1, 2], [1, 2], "")
    assert cut([1, 2, 3], [1, 2, 3], 2, None) == ([1, 2], [1, 2], "completion")


def test_the_prompt_is_tokenized_as_generation_sees_it():
    """Prompt and completion stay apart where they would merge into one token.

    Elsewhere the text is tokenized whole.
    """
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert encode_segments(merging, [[("a", False), ("b", True)]], special=True) == [
        ([0, 1], [-100, 1])
    ]
    assert encode_segments(merging, [[("a", False), ("ab", True)]], special=True) == [
        ([0, 2], [-100, 2])
    ]


@pytest.mark.parametrize("label", [1, "B", "no"])
def test_choices(tmp_path, label):
    rows = [
        {"prompt": f"{i}?", "choices": ["yes", "no", "maybe so"], "label": label} for i in range(4)
    ]
    data = ready(
        CausalLMData(
            write(tmp_path / "a.jsonl", rows), write(tmp_path / "v.jsonl", rows), eval_batch_size=4
        )
    )
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
    data = ready(
        CausalLMData(
            write(tmp_path / "a.jsonl", rows), write(tmp_path / "v.jsonl", rows), chat=True
        )
    )
    labels = next(iter(data.val_dataloader()))["choices"]["labels"]
    assert [data.tokenizer.decode(ids[ids != -100]) for ids in labels] == ["yes", "no"] * 2


def test_conversations(tmp_path):
    turns = [
        ("system", "Be short."),
        ("user", "Hi"),
        ("assistant", "Yo"),
        ("user", "Bye"),
        ("assistant", "Ciao"),
    ]
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
    assert (
        ready(asked, stage="predict").examples("predict")[0]["prompt"]
        == "<s>user\nHi<end>\n<s>assistant\n"
    )


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
        ready(ClassificationData(str(folder), batch_size=9)).examples("val")[i]["label"]
        for i in range(3)
    ) == [0, 1, 2]


def test_classes_are_the_sorted_labels_where_nothing_names_them(tmp_path):
    names = [{"text": "t", "label": name} for name in ("no", "yes", "maybe")] * 2
    data = ready(
        ClassificationData(write(tmp_path / "a.jsonl", names), write(tmp_path / "v.jsonl", names))
    )
    assert data.class_names == ["maybe", "no", "yes"]
    assert [e["label"] for e in data.examples("train")] == [1, 2, 0, 1, 2, 0]
    stars = [{"text": "t", "label": k} for k in (5, 1, 3)]
    data = ready(
        ClassificationData(write(tmp_path / "b.jsonl", stars), write(tmp_path / "w.jsonl", stars))
    )
    assert data.class_names == ["1", "3", "5"]
    assert [e["label"] for e in data.examples("val")] == [2, 0, 1]


def test_pairs_have_types(tmp_path):
    rows = [{"a": "one", "b": "two", "y": "same" if i % 2 else "other"} for i in range(4)]
    path = write(tmp_path / "a.jsonl", rows)
    fields = {"text": "a", "text_pair": "b", "label": "y"}
    data = ready(
        ClassificationData(path, path, batch_size=4, max_length=8, **fields),
        tiny_tokenizer(pairs=True),
    )
    batch = next(iter(data.val_dataloader()))
    assert (
        batch["token_type_ids"][0].tolist()
        == [0, 0, 0, 0, 1, 1, 1, 1][: batch["token_type_ids"].shape[1]]
    )
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert data.truncated["train"] == 4
    assert data.class_names == ["other", "same"]
    assert "labels" not in next(
        iter(ready(ClassificationData(path, predict=path, **fields)).predict_dataloader())
    )


def test_yaml_is_short_and_survives_being_saved(folder, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=TaskData)
    init_args = f"{{sources: {folder}, max_length: 99, chat: false}}"
    short = f"data: {{class_path: CausalLMData, init_args: {init_args}}}"
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
        assert parser.dump(again) == parser.dump(config)
        data = parser.instantiate(again).data
        assert len(data.rows("train")) == rows
    assert data.rows("train")[0]["prompt"] == "Question: 1\nAnswer:"
    assert len(data.rows("val")) == 2


def tabulate(path, rows):
    """Write rows as what the ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        write(path, rows)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)


KINDS = {
    "csv": ("c.csv", "c.csv"),
    "one column": ("words.csv", "words.csv"),
    "tsv": ("c.tsv", "c.tsv"),
    "json": ("c.json", "c.json"),
    "jsonl": ("c.jsonl", "c.jsonl"),
    "parquet": ("c.parquet", "c.parquet"),
    "folder": ("whole/train.jsonl", "whole"),
    "glob": ("some/a.json", "some/*.json"),
    "glob of letters": ("some/a.csv", "some/[ab].csv"),
}
"""Kind -> (file, path of it)."""

KEYS = {"sources": "train", "validation": "val", "test": "test", "predict": "predict"}
"""Key -> split."""

GIVEN = [
    (CausalLMData, ("csv", "tsv", "folder", "one column")),
    (CausalLMData, ("json", "parquet", "glob", "csv")),
    (CausalLMData, ("jsonl", "glob of letters", "json", "folder")),
    (ClassificationData, ("tsv", "folder", "csv", "one column")),
    (ClassificationData, ("parquet", "glob", "json", "csv")),
    (ClassificationData, ("glob of letters", "json", "jsonl", "folder")),
]
"""(data module, kind at each key). Together every data module has every kind."""


MODEL = {
    "class_path": "CausalLM",
    "init_args": {"backbone": "no-such-model", "adapters": [{"parameterization": ["LoRA"]}]},
}


class Parsed(Exception):
    """Stops the command once it is parsed, and carries the data module."""


@pytest.fixture
def command(monkeypatch, capsys):
    """Parse arguments by the command: (the data module, the printed configuration)."""

    def stop(cli):
        raise Parsed(cli.parser.instantiate(cli.config).fit.data)

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(AdaptrankCLI, "instantiate_classes", stop)
            with pytest.raises(Parsed) as parsed:
                AdaptrankCLI("fit", args)
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main(["fit", *args, "--print_config"])
        said = capsys.readouterr()
        assert not leaving.value.code, said.err
        return parsed.value.args[0], said.out

    return run


@pytest.mark.parametrize(
    ("data", "kinds"), GIVEN, ids=[f"{data.__name__}-{kinds[0]}" for data, kinds in GIVEN]
)
def test_the_command_takes_a_path_of_every_kind(data, kinds, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for kind in kinds:
        rows = (
            sums(4)
            if data is CausalLMData
            else [{"text": f"film {i}", "label": i % 2} for i in range(4)]
        )
        if kind == "one column":  # a CSV whose text is one plain word after the other
            column = "prompt" if data is CausalLMData else "text"
            rows = [{column: f"word{i}"} for i in range(4)]
        tabulate(tmp_path / KINDS[kind][0], rows)
    paths = {key: KINDS[kind][1] for key, kind in zip(KEYS, kinds, strict=True)}
    given = {"class_path": data.__name__, "init_args": paths}
    Path("run.yaml").write_text(yaml.safe_dump({"model": MODEL, "data": given}))
    Path("bare.yaml").write_text(
        yaml.safe_dump({"model": MODEL, "data": {"class_path": data.__name__}})
    )
    typed = []
    for key, path in paths.items():
        both_in_one = key in ("sources", "validation")
        typed += [f"--data.{key}={path}"] if both_in_one else [f"--data.{key}", path]
    for args in (["--config", "run.yaml"], ["--config", "bare.yaml", *typed]):
        made, printed = command(*args)
        read = yaml.safe_load(printed)["data"]["init_args"]
        assert {key: read[key] for key in KEYS} == paths
        assert {split: [s.path for s in v] for split, v in made._sources.by_split.items()} == {
            KEYS[key]: [path] for key, path in paths.items()
        }
    Path("printed.yaml").write_text(printed)
    again, reprinted = command("--config", "printed.yaml")
    assert reprinted == printed
    assert len(again.rows("train")) == 4
    if kinds[-1] == "one column":
        assert len(again.rows("predict")) == 4


def test_the_command_takes_lists_of_sources(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    tabulate(tmp_path / "c.csv", sums(4)), tabulate(tmp_path / "a.json", sums(4, 10))
    sources = [{"path": "c.csv", "weight": 2, "prompt": "Q {prompt}"}, {"path": "a.json"}]
    data = {"class_path": "CausalLMData", "init_args": {"sources": sources}}
    Path("run.yaml").write_text(yaml.safe_dump({"model": MODEL, "data": data}))
    for args in (
        [],
        ["--data.sources", json.dumps(sources)],
        ["--data.validation", '[{"path": "a.json"}]'],
    ):
        made, printed = command("--config", "run.yaml", *args)
        assert [type(source) for source in made._sources.by_split["train"]] == [Source, Source]
        rows = made.rows("train")
        assert sum(row["prompt"].startswith("Q Q") for row in rows) in (6, 8)
        Path("printed.yaml").write_text(printed)
        assert command("--config", "printed.yaml")[1] == printed


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one data set of two splits, which keeps what was asked of it."""
    from datasets import ClassLabel, Features, Value

    names = ClassLabel(names=["bad", "good"])
    features = Features({"text": Value("string"), "label": names})
    splits = {
        "train": Dataset.from_dict(
            {"text": ["a", "b", "c", "d"], "label": [0, 1, 1, 0]}, features=features
        ),
        "validation": Dataset.from_dict({"text": ["v", "w"], "label": [1, 0]}, features=features),
    }
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        if path != "some/films":
            raise FileNotFoundError(f"no {path}")
        whole, _, rest = split.partition("[")
        return splits[whole].select(range(int(rest[1:-1]))) if rest else splits[whole]

    def get_dataset_split_names(path, name=None):
        asked.append((path, name, None))
        return list(splits)

    monkeypatch.setattr("datasets.load.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.inspect.get_dataset_split_names", get_dataset_split_names)
    return asked


def test_the_hub_is_asked_for_name_configuration_and_split(hub):
    data = ready(ClassificationData([Source("some/films", name="short")]))
    assert data.class_names == ["bad", "good"]
    assert [row["text"] for row in data.rows("train")] == ["a", "b", "c", "d"], (
        "its own validation split validates"
    )
    assert [(row["text"], row["label"]) for row in data.rows("val")] == [("v", 1), ("w", 0)]
    assert data.rows("test") is None
    assert set(hub) == {("some/films", "short", split) for split in (None, "train", "validation")}
    hub.clear()
    part = ClassificationData(
        [Source("some/films", split="train[:3]")], [Source("some/films", split="validation")]
    )
    assert [len(part.rows(split)) for split in ("train", "val")] == [3, 2]
    assert set(hub) == {("some/films", None, "train[:3]"), ("some/films", None, "validation")}
    held = ClassificationData([Source("some/films", split="train")], val_fraction=0.25)
    assert [len(held.rows(split)) for split in ("train", "val")] == [3, 1], (
        "who names a split takes no other"
    )
    assert len(ClassificationData("some/films", test="some/films").rows("test")) == 2, (
        "it has no test split"
    )


def test_what_the_hub_has_not_is_said(hub, monkeypatch):
    assert "There is no file or folder 'some/flims' here" in problem(
        ClassificationData([Source("some/flims", split="train")])
    )
    monkeypatch.setattr("datasets.inspect.get_dataset_split_names", lambda *_: ["dev"])
    assert "has no train split. Set `split` to one of ['dev']" in problem(
        ClassificationData("some/films")
    )


def scores(labels):
    return [{"text": f"pair {i}", "label": label} for i, label in enumerate(labels)]


def test_regression_keeps_numbers(tmp_path):
    table = Dataset.from_list(scores([0.5, 3.0, 4.8, 1.25]))
    table.to_csv(str(tmp_path / "a.csv"), index=False)
    whole = write(tmp_path / "v.jsonl", scores([1, 2, 3]))
    (tmp_path / "labels.json").write_text('["these", "name", "nothing"]')
    data = ready(ClassificationData(str(tmp_path / "a.csv"), whole, regression=True))
    assert data.class_names is None
    assert data.num_classes == 1
    batch = next(iter(data.train_dataloader()))["labels"]
    assert batch.dtype == torch.float32
    assert sorted(batch.tolist()) == pytest.approx([0.5, 1.25, 3.0, 4.8])
    batch = next(iter(data.val_dataloader()))["labels"]
    assert (batch.dtype, batch.tolist()) == (torch.float32, [1.0, 2.0, 3.0])
    asked = ready(
        ClassificationData(whole, predict=str(tmp_path / "a.csv"), regression=True), stage="predict"
    )
    assert "labels" not in next(iter(asked.predict_dataloader()))
    assert [
        row["label"] for row in ClassificationData(whole, whole, regression=True).rows("val")
    ] == [1.0, 2.0, 3.0]
    spelled = write(tmp_path / "s.jsonl", scores(["3.5", "-1e-1"]))
    assert [
        r["label"] for r in ClassificationData(spelled, spelled, regression=True).rows("train")
    ] == [3.5, -0.1]


@pytest.mark.parametrize("label", ["good", "nan", [1.0]])
def test_regression_refuses_what_is_no_number(label, tmp_path):
    path = write(tmp_path / "a.jsonl", scores([label]))
    assert f"Row 0 of {path!r}: label {label!r} is no number" in problem(
        ClassificationData(path, path, regression=True)
    )


def test_classes_and_regression_exclude_each_other(tmp_path):
    path = write(tmp_path / "a.jsonl", scores([0.5, 1.0]))
    assert "label 0.5 is no class" in problem(ClassificationData(path, path))
    assert "`regression: true`" in problem(ClassificationData(path, path))
    with pytest.raises(ValueError, match="Remove one of the two"):
        ClassificationData(path, regression=True, classes=["a"])


def test_pairs_and_single_texts_are_not_mixed_unasked(tmp_path):
    pairs = write(
        tmp_path / "p.jsonl", [{"text": "one", "text_pair": "two", "label": k} for k in (0, 1)]
    )
    other = write(
        tmp_path / "o.jsonl", [{"text": "three", "second": "four", "label": k} for k in (0, 1)]
    )
    for sources in ([Source(pairs), Source(other)], [Source(other), Source(pairs)]):
        said = problem(ClassificationData(sources, pairs))
        assert said.startswith(
            f"{pairs!r} has pairs of texts, and {other!r} has no column for `text_pair`"
        )
    tokenizer = tiny_tokenizer(pairs=True)

    def texts(*sources):
        data = ready(ClassificationData(list(sources), pairs), tokenizer, "fit")
        return [tokenizer.decode(example["input_ids"]) for example in data.examples("train")]

    both = texts(Source(pairs), Source(other, text_pair="second"))
    assert both == ["<s>one<end>two<end>"] * 2 + ["<s>three<end>four<end>"] * 2
    alone = texts(Source(pairs), Source(other, text_pair=""))
    assert alone == ["<s>one<end>two<end>"] * 2 + ["<s>three<end>"] * 2


def test_a_row_whose_pair_is_null_is_a_single_text(tmp_path):
    rows = [
        {"text": "one", "text_pair": pair, "label": k} for k, pair in enumerate(["two", None, ""])
    ]
    path = write(tmp_path / "a.jsonl", rows)
    data = ready(ClassificationData(path, path, batch_size=3), tiny_tokenizer(pairs=True), "fit")
    decoded = [data.tokenizer.decode(example["input_ids"]) for example in data.examples("train")]
    assert decoded == ["<s>one<end>two<end>", "<s>one<end>", "<s>one<end>"]
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [0, 1, 2]


class Mixed(LabelTask):
    def rows(self, split):
        return [{"text": "one", "text_pair": "two", "label": 0}, {"text": "three", "label": 1}]


def test_a_task_of_ones_own_gives_every_row_a_pair_or_none():
    assert "1 of 2 train rows have no `text_pair`, the first of them 'three'" in problem(Mixed())


def problem(data, stage="fit"):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ready(data, stage=stage)
    return str(caught.value)


def test_missing_files_are_answered_with_the_nearest(folder, tmp_path):
    assert "Did you mean 'sums'?" in problem(CausalLMData(str(tmp_path / "sum")))
    assert "Did you mean 'train.jsonl'?" in problem(CausalLMData(str(folder / "trains.jsonl")))
    assert "does not exist either" in problem(CausalLMData(str(tmp_path / "no/where.csv")))
    assert "No file matches" in problem(CausalLMData(str(tmp_path / "*.csv")))
    (tmp_path / "empty").mkdir()
    assert "has no data file" in problem(CausalLMData(str(tmp_path / "empty")))
    assert "no 'extra' split. It holds ['train.jsonl'" in problem(
        CausalLMData([Source(str(folder), split="extra")])
    )


def test_missing_columns_are_answered_with_those_there_are(folder, tmp_path):
    said = problem(CausalLMData(str(folder), prompt="{promt}"))
    assert (
        "no column 'promt', only ['prompt', 'completion', 'answer']. Did you mean 'prompt'?" in said
    )
    assert "prompt: 'Q {' is no format string" in problem(CausalLMData(str(folder), prompt="Q {"))
    path = write(tmp_path / "a.jsonl", [{"question": "q", "reply": "r"}] * 3)
    assert 'for example prompt: "{question}"' in problem(CausalLMData(path))
    assert "no column 'completion'" in problem(CausalLMData(path, prompt="question"))
    path = write(
        tmp_path / "b.jsonl",
        [{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}] * 2,
    )
    assert "Row 1 of" in problem(CausalLMData(path))


def test_labels_outside(tmp_path):
    rows = [{"prompt": "q", "choices": ["a", "b"], "label": 2}] * 3
    assert "label 2 is none of its 2 choices. Use 0 to 1" in problem(
        CausalLMData(write(tmp_path / "a.jsonl", rows))
    )
    good, bad = (
        write(tmp_path / "t.jsonl", reviews(6)),
        write(tmp_path / "v.jsonl", [{"text": "x", "label": 7}]),
    )
    assert "label 7 is none of the 3 classes ['0', '1', '2']" in problem(
        ClassificationData(good, bad)
    )
    assert "label 2 is none of the 2 classes" in problem(
        ClassificationData(good, classes=["a", "b"])
    )
    named = write(tmp_path / "n.jsonl", [{"text": "x", "label": "positiv"}] * 3)
    assert "Did you mean 'positive'?" in problem(
        ClassificationData(named, classes=["negative", "positive"])
    )


def test_empty_splits_and_shares(folder, tmp_path):
    empty = tmp_path / "none.csv"
    empty.write_text("prompt,completion\n")
    assert f"No rows come from '{empty}'" in problem(
        CausalLMData(str(folder), validation=str(empty))
    )
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
