"""Splits by the names of files and folders, and columns that only one split has."""

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from lightning.pytorch import Trainer
from test_cli import cli, here  # noqa: F401
from test_cli import write as write_config
from test_data_text import cache, problem, ready, sums, write
from test_images import folder_of_classes
from test_images import ready as images_ready

from adaptrank.artifacts import read_adapter, save_adapter
from adaptrank.data import (
    CausalLMData,
    ClassificationData,
    ImageData,
    MultipleChoiceData,
    Source,
)
from adaptrank.data.split_names import SPLIT_NAMES, split_of
from adaptrank.modules import Adapter, SequenceClassification
from adaptrank.parameterizations import LoRA

__all__ = ["cache"]  # a fixture


def folder_of(root, **starts):
    """Write a file of four rows for each stem. The prompts begin at a number of its own."""
    for stem, start in starts.items():
        write(root / f"{stem}.jsonl", sums(4, start))
    return str(root)


def named(root, *stems):
    return folder_of(root, **{stem: 100 * k for k, stem in enumerate(stems)})


def starts(rows):
    """Return the hundreds of the prompts of rows, which tell their files."""
    return sorted({int(row["prompt"].split()[1]) // 100 for row in rows})


# ---- names


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        *((word, split) for split, words in SPLIT_NAMES.items() for word in words),
        ("Train", "train"),
        ("TEST", "test"),
        ("gsm_train", "train"),
        ("gsm-Test", "test"),
        ("gsm.dev", "validation"),
        ("gsmTrain", "train"),
        ("TestData", "test"),
        ("testset", "test"),
        ("test_set", "test"),
        ("train2", "train"),
        ("train (1)", "train"),
        ("train-00000-of-00003", "train"),
        ("squad-validation-00001-of-00003", "validation"),
        ("validation_matched", "validation"),
        ("training_tips", "train"),
        ("contest", None),
        ("latest", None),
        ("device", None),
        ("valuable", None),
        ("dataset", None),
        ("restrain", None),
        ("my_test_v2", None),
        ("train_test", None),
        ("2024", None),
        ("", None),
    ],
)
def test_a_split_is_known_by_a_word_at_either_end(stem, split):
    assert split_of(stem) == split


# ---- folders of files


@pytest.mark.parametrize(
    ("stems", "train", "val"),
    [
        (("Train", "Test"), [0], [0]),
        (("gsm_train", "gsm_test"), [0], [0]),
        (("train", "eval"), [0], [1]),
        (("Training", "Evaluation", "Testing"), [0], [1]),
        (("trainset", "devset", "testset"), [0], [1]),
        (("train-00000-of-00002", "train-00001-of-00002", "test"), [0, 1], [0, 1]),
        (("contest", "latest"), [0, 1], [0, 1]),
        (("my_train_v2",), [0], [0]),
    ],
)
def test_files_of_other_splits_are_not_trained_on(stems, train, val, tmp_path, caplog):
    data = CausalLMData(named(tmp_path / "a", *stems), val_fraction=0.3)
    assert starts(data.rows("train")) == train
    assert set(starts(data.rows("val"))) <= set(val)
    assert not caplog.records


def test_the_endings_of_files_may_be_capitals(tmp_path):
    named(tmp_path / "a", "train", "test")
    (tmp_path / "a/test.jsonl").rename(tmp_path / "a/TEST.JSONL")
    path = str(tmp_path / "a")
    assert starts(CausalLMData(path, test=path).rows("test")) == [1]


@pytest.mark.parametrize(
    "stems",
    [("my_train_v2", "my_test_v2"), ("train_test", "more"), ("web_dev_talks", "cooking_talks")],
)
def test_names_that_may_mean_a_split_are_refused(stems, tmp_path):
    path = named(tmp_path / "a", *stems)
    said = problem(CausalLMData(path))
    assert f"The folder {path!r} has no file that is named after the train split" in said
    trains = next((stem for stem in stems if "train" in stem), "web_dev_talks")
    assert f"give the path of one file, such as '{path}/{trains}.jsonl'." in said
    assert starts(CausalLMData(f"{path}/*.jsonl").rows("train")) == [0, 1], "a pattern is explicit"


@pytest.mark.parametrize(
    "stems", [("train", "dev", "eval"), ("train", "training_tips", "validation")]
)
def test_two_words_for_one_split_are_refused(stems, tmp_path):
    path = named(tmp_path / "a", *stems)
    said = problem(CausalLMData(path))
    assert f"{path!r} has its " in said
    assert "split under several names: " in said
    assert "Give the path of one of them" in said


def test_a_word_in_the_key_split_is_that_word(tmp_path):
    path = named(tmp_path / "a", "train", "dev", "eval", "extra_b")
    for split, start in (("dev", [1]), ("eval", [2]), ("extra_b", [3])):
        data = CausalLMData(path, [Source(path, split=split)])
        assert starts(data.rows("val")) == start


def test_a_file_beside_splits_that_is_not_read_is_named_once(tmp_path, caplog):
    path = named(tmp_path / "a", "train", "validation", "more")
    data = CausalLMData(path, test=path)
    assert starts(data.rows("train")) == [0]
    data.rows("val"), data.rows("train"), data.rows("test")
    said = [record.getMessage() for record in caplog.records if "more" in record.getMessage()]
    assert said == [
        f"{path!r} holds data that no split is named after, which are not read: 'more.jsonl'."
    ]


def test_training_rows_by_elimination_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO, "adaptrank.data")
    path = named(tmp_path / "a", "cooking", "web_dev")
    assert starts(CausalLMData(path).rows("train")) == [0]
    assert f"No data of {path!r} are named after the train split" in caplog.text
    assert "are trained on: 'cooking.jsonl'" in caplog.text


@pytest.mark.parametrize(
    ("key", "stems", "serving"),
    [
        ("test", ("train",), "train.jsonl"),
        ("test", ("train", "eval"), "eval.jsonl"),
        ("validation", ("train", "test"), "train.jsonl"),
        ("predict", ("Train",), "Train.jsonl"),
    ],
)
def test_a_named_source_without_the_split_says_what_serves(key, stems, serving, tmp_path, caplog):
    path = named(tmp_path / "a", *stems)
    data = CausalLMData(path, **{key: path})
    data.rows({"validation": "val"}.get(key, key))
    name = "test" if key == "predict" else key
    (record,) = caplog.records
    assert record.getMessage() == (
        f"`{key}` reads {serving!r} of {path!r}, which has no {name} split."
    )


def test_a_source_without_splits_says_nothing(tmp_path, caplog):
    path = named(tmp_path / "a", "part0", "part1")
    data = CausalLMData(path, path, path, f"{path}/part0.jsonl")
    for split in ("train", "val", "test", "predict"):
        data.rows(split)
    assert not caplog.records


def test_saved_data_sets_name_their_splits_alike(tmp_path, caplog):
    parts = {"Train": Dataset.from_list(sums(4)), "eval": Dataset.from_list(sums(4, 100))}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    data = CausalLMData(path, test=path)
    assert [starts(data.rows(split)) for split in ("train", "val", "test")] == [[0], [1], [1]]
    assert "`test` reads 'eval' of" in caplog.text


def test_the_hub_names_its_splits_alike(monkeypatch):
    splits = {"train": Dataset.from_list(sums(4)), "dev": Dataset.from_list(sums(4, 100))}
    monkeypatch.setattr("datasets.inspect.get_dataset_split_names", lambda *_: list(splits))
    monkeypatch.setattr("datasets.load.load_dataset", lambda *_, split: splits[split])
    data = CausalLMData("some/sums")
    assert [starts(data.rows(split)) for split in ("train", "val")] == [[0], [1]]


# ---- folders of images


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("training_set", "test_set"), ("mri_train", "mri_test")]
)
def test_image_folders_of_other_splits_are_no_classes(names, tmp_path, caplog):
    for name in names:
        folder_of_classes(tmp_path / name, {"glioma": 3, "healthy": 3})
    folder_of_classes(tmp_path, {"masks": 1})
    data = images_ready(ImageData(str(tmp_path), test=str(tmp_path), validation=0.4))
    assert data.class_names == ["glioma", "healthy"]
    assert {Path(row["image"]).parts[-3] for row in data.rows("train")} == {names[0]}
    assert {Path(row["image"]).parts[-3] for row in data.rows("test")} == {names[1]}
    assert caplog.text.count("which are not read: 'masks'") == 1


def test_classes_with_a_word_of_a_split_stay_classes(tmp_path):
    path = folder_of_classes(tmp_path, {"bus": 4, "express_train": 4, "contest": 4})
    assert images_ready(ImageData(path)).class_names == ["bus", "contest", "express_train"]


# ---- the rows that are scored


def test_an_evaluation_says_which_rows_it_scores(here, cli, tiny_llama):  # noqa: F811
    data = {"class_path": "CausalLMData", "init_args": {"sources": "sums", "batch_size": 2}}
    named(here / "sums", "train", "validation", "test")
    write_config(here, tiny_llama, data=data)
    quick = ("--config", "tiny.yaml", "--model.generate", "false", "--trainer.limit_test_batches=1")
    code, out, err = cli("test", *quick)
    assert code == 0, err
    assert "scored on the validation rows, since no `test` source is given" in out
    code, out, err = cli("test", *quick, "--data.test", "sums")
    assert code == 0, err
    assert "scored on the test rows" in out
    code, out, err = cli("validate", *quick)
    assert code == 0, err
    assert "scored on the validation rows." in out
    code, out, err = cli("predict", *quick, "--trainer.limit_predict_batches=1")
    assert code == 0, err
    assert "Predicts the validation rows, since no `predict` source is given" in err
    assert all(json.loads(line) for line in out.splitlines())


# ---- columns of one split


def pair_files(root, other="premise"):
    rows = [{"text": "one", "label": k % 2} for k in range(4)]
    paired = [{**row, "text_pair": "two"} for row in rows]
    renamed = [{**row, other: "three"} for row in rows]
    return write(root / "train.jsonl", paired), write(root / "b.jsonl", renamed)


@pytest.mark.parametrize("split", ["val", "test", "predict"])
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("trains_on_pairs", [True, False])
def test_pairs_of_one_split_alone_are_refused(split, is_first, trains_on_pairs, tmp_path):
    paths = pair_files(tmp_path)
    train, other = paths if trains_on_pairs else reversed(paths)
    data = ClassificationData(
        train, **{"validation": train, {"val": "validation"}.get(split, split): other}
    )
    order = (split, "train") if is_first else ("train", split)
    with pytest.raises(ValueError, match="has no column for `text_pair`") as caught:
        [data.rows(each) for each in order]
    assert str(caught.value).startswith(f"{paths[0]!r} has pairs of texts, and {paths[1]!r} has no")
    alone = ClassificationData(paths[0], [Source(paths[1], text_pair="")], paths[0])
    named_pair = ClassificationData(paths[0], [Source(paths[1], text_pair="premise")])
    for good, pair in ((alone, ""), (named_pair, "three")):
        good.rows("train")
        assert good.rows("val")[0]["text_pair"] == pair


def test_two_splits_of_a_folder_are_told_by_their_files(tmp_path):
    _, other = pair_files(tmp_path / "a")
    Path(other).rename(tmp_path / "a/validation.jsonl")
    said = problem(ClassificationData(str(tmp_path / "a")))
    assert "('train.jsonl') has pairs of texts" in said
    assert "('validation.jsonl') has no column for `text_pair`" in said


def test_an_adapter_remembers_whether_it_read_pairs(tmp_path, tiny_bert, caplog):
    train, other = pair_files(tmp_path)
    module = SequenceClassification(tiny_bert, [Adapter([LoRA])], dtype="fp32")
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=1, **options)
    trainer.fit(module, datamodule=ClassificationData(train, train, batch_size=2))
    folder = save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    assert read_adapter(folder)["conventions"]["fields"] == ["text_pair"]
    said = "The adapter was trained with fields=['text_pair'], and the data have []."
    assert said not in caplog.text
    # Prediction with a trained adapter reads no training row.
    trained = SequenceClassification(tiny_bert, adapter=str(folder), dtype="fp32")
    data = ClassificationData("no/such.jsonl", predict=other, batch_size=2)
    Trainer(**options).predict(trained, datamodule=data)
    assert said in caplog.text


def test_contexts_of_one_split_alone_are_refused(tmp_path):
    row = {"question": "q", "choices": ["a", "b"], "label": 0}
    train = write(tmp_path / "a.jsonl", [{**row, "context": "c"}] * 4)
    other = write(tmp_path / "b.jsonl", [{**row, "passage": "c"}] * 4)
    assert f"{train!r} has contexts, and {other!r} has no column for `context`" in problem(
        MultipleChoiceData(train, other)
    )
    data = MultipleChoiceData(train, [Source(other, context="")])
    assert ready(data, stage="fit").conventions()["fields"] == ["context", "question"]
    assert data.rows("val")[0]["context"] == ""
    questions = write(tmp_path / "c.jsonl", [{"context": "c", "choices": ["a"], "label": 0}] * 2)
    assert f"{questions!r} has no column for `question`" in problem(
        MultipleChoiceData(train, questions)
    )


def test_a_column_of_prompts_that_one_split_lacks_is_told_once(tmp_path, caplog):
    row = {"instruction": "add", "output": "3"}
    train = write(tmp_path / "a.jsonl", [{**row, "input": "1 2"}] * 4)
    other = write(tmp_path / "b.jsonl", [{**row, "context": "1 2"}] * 4)
    data = CausalLMData(train, other, other)
    for split in ("val", "train", "test"):
        data.rows(split)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{train!r} has a column 'input', and {other!r} has none. If it has another name there, "
        "rename it: it is not read."
    ]
