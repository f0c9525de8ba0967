import json
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptrank.data import GeneratedSentences, TokenClassificationData
from adaptrank.data.token_task import first_pieces, needs_spaces, piece_labels
from adaptrank.modules import Adapter, TokenClassification
from adaptrank.parameterizations import LoRA

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
ROWS = [
    {"tokens": ["How", "many", "12"], "tags": ["O", "B-X", "I-X"]},
    {"tokens": ["the", "9"], "tags": ["B-Y", "O"]},
    {"tokens": ["and"], "tags": ["O"]},
]


def tagger(folder, **arguments):
    return TokenClassification(
        folder, [Adapter([partial(LoRA, rank=2)])], dtype="fp32", **arguments
    )


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def prepared(data, tokenizer, stage="fit"):
    data.tokenizer = tokenizer
    data.setup(stage)
    return data


@pytest.fixture
def tokenizer(tiny_bert):
    return tagger(tiny_bert).tokenizer


# ---- words and pieces


def test_the_first_piece_of_a_word_carries_its_label():
    words = [None, 0, 0, 1, 3, None]
    assert first_pieces(words, 4) == [1, 3, -1, 4]
    assert piece_labels(words, [5, 6, 7, 8], False) == [-100, 5, -100, 6, 8, -100]
    assert piece_labels(words, [5, 6, 7, 8], True) == [-100, 5, 5, 6, 8, -100]


def test_a_batch_has_the_labels_of_words(tokenizer, tmp_path):
    data = TokenClassificationData(
        write(tmp_path / "a.jsonl", ROWS), validation=str(tmp_path / "a.jsonl"), batch_size=3
    )
    prepared(data, tokenizer)
    assert data.class_names == ["O", "B-X", "I-X", "B-Y"]
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [[0, 1, 2, -100], [3, 0, -100, -100], [0] + 3 * [-100]]
    assert batch["first_pieces"].tolist() == [[0, 1, 2], [0, 1, -1], [0, -1, -1]]
    assert batch["tags"].tolist() == [[0, 1, 2], [3, 0, -100], [0, -100, -100]]
    assert "tags" not in data.collate("train")(data.examples("train"))


def test_words_of_byte_tokenizers_begin_with_a_space(tokenizer):
    """Given a list of words, these tokenizers would read one long word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "o"), ("Ġ", "b"), ("Ġb", "e"), ("b", "e")]
    vocabulary = {token: k for k, token in enumerate([*alphabet, "to", "Ġb", "Ġbe", "be"])}
    of_bytes = Tokenizer(models.BPE(vocabulary, merges))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes = PreTrainedTokenizerFast(tokenizer_object=of_bytes)
    assert needs_spaces(of_bytes)
    assert not needs_spaces(tokenizer)


def test_words_beyond_max_length_are_told_and_have_no_prediction(tiny_bert, tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", [{"tokens": ["12", "the", "345"]}, {"tokens": ["and"]}])
    train = write(tmp_path / "t.jsonl", ROWS)
    data = TokenClassificationData(train, predict=file, max_length=3, batch_size=2)
    module = tagger(tiny_bert)
    with caplog.at_level(logging.WARNING):
        (predicted,) = Trainer(**QUIET).predict(module, datamodule=data)
    assert "1 of 2 predict rows exceed max_length=3: 1 sentences cut" in caplog.text
    assert "1 words of the predict sentences have no piece" in caplog.text
    first, second = predicted
    assert first["tokens"] == ["12", "the", "345"]
    assert first["tags"][2] is None
    assert first["probabilities"][2] is None
    assert {first["tags"][0], second["tags"][0]} <= set(data.class_names)
    assert 0.25 <= first["probabilities"][0] <= 1


# ---- data


def test_tags_of_a_saved_data_set_are_numbers_with_names(tokenizer, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    names = ["O", "B-X", "I-X"]
    features = Features(
        {"tokens": Sequence(Value("string")), "ner": Sequence(ClassLabel(names=names))}
    )
    rows = {"tokens": [["How", "many"], ["the", "9"]], "ner": [[0, 2], [1, 0]]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    data = TokenClassificationData(str(tmp_path / "saved"), tags="ner", val_fraction=0.5)
    prepared(data, tokenizer)
    assert data.class_names == names
    both = [*data.examples("train"), *data.examples("val")]
    assert sorted(example["tags"].tolist() for example in both) == [[0, 2], [1, 0]]


CONLL = """-DOCSTART- -X- O

# id 7
How WRB B-X
many\tJJ\tI-X

the DT O
9 CD B-Y
"""


@pytest.mark.parametrize("name", ["train.conll", "train.txt"])
def test_a_conll_file_has_words_and_tags_in_columns(tokenizer, tmp_path, name):
    (tmp_path / name).write_text(CONLL.replace("\t", " ") if name.endswith("txt") else CONLL)
    file = str(tmp_path / name)
    data = prepared(TokenClassificationData(file, validation=file), tokenizer)
    assert [example["tokens"] for example in data.examples("val")] == [
        ["How", "many"],
        ["the", "9"],
    ]
    assert data.class_names == ["O", "B-X", "I-X", "B-Y"]
    others = TokenClassificationData(file, validation=file, tags="column_2")
    assert prepared(others, tokenizer).class_names == ["CD", "DT", "JJ", "WRB"]


def test_universal_dependencies_are_read(tokenizer, tmp_path):
    line = "{}\t{}\tx\t{}\t_\t_\t0\t_\t_\t_\n"
    words = [("1-2", "howmany", "_"), ("1", "How", "ADV"), ("2", "many", "ADJ"), ("2.1", "x", "_")]
    (tmp_path / "a.conllu").write_text("# text = How\n" + "".join(line.format(*w) for w in words))
    file = str(tmp_path / "a.conllu")
    data = prepared(TokenClassificationData(file, validation=file), tokenizer)
    (example,) = data.examples("val")
    assert example["tokens"] == ["How", "many"]
    assert data.class_names == ["ADJ", "ADV"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.conll", "How O\nmany\n", r"line 2, cannot be read as conll: a word has 1 columns"),
        ("a.conllu", "1\tHow\tADV\n", r"line 1, .* a word has 3 columns, and CoNLL-U has 10"),
        ("a.conll", "How\n\nmany\n", "has no column 'tags', only .*'tokens'"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', "Row 0 .* 1 tokens and 2 tags"),
        ("a.jsonl", '{"tokens": "How many", "tags": ["O"]}', "tokens is 'How many'.* no list"),
        ("a.jsonl", '{"tokens": [], "tags": []}', "Row 0 .* has no words"),
        ("a.txt", "", "No rows come from"),
    ],
)
def test_damaged_data_are_refused_by_name(tokenizer, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    data = TokenClassificationData(str(tmp_path / name), validation=str(tmp_path / name))
    with pytest.raises(ValueError, match=said):
        prepared(data, tokenizer)


def test_a_tag_that_is_no_class_is_refused(tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    data = TokenClassificationData(file, validation=file, classes=["O", "B-X", "I-X"])
    with pytest.raises(ValueError, match=r"word 0 \('the'\).* 'B-Y' is none of the 3 classes"):
        prepared(data, tokenizer)


# ---- the module


def test_the_loss_is_the_mean_over_labelled_words(tiny_bert, tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    data = TokenClassificationData(file, validation=file, batch_size=2)
    module = tagger(tiny_bert)
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    losses, right = [], 0
    module.eval()
    for row, tags in zip(ROWS, ([0, 1, 2], [3, 0], [0]), strict=True):
        ids = module.tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        logits = module.model(input_ids=ids["input_ids"]).logits[0]
        # A word of digits has several pieces, the first of which counts.
        first = logits[first_pieces(ids.word_ids(0), len(tags))]
        losses.append(F.cross_entropy(first, torch.tensor(tags), reduction="none"))
        right += int((first.argmax(-1) == torch.tensor(tags)).sum())
    assert result["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert result["accuracy"] == pytest.approx(right / 6)
    assert 0 <= result["entity_f1"] <= 1


def test_batches_of_another_task_are_refused(tiny_bert, tmp_path):
    from adaptrank.data import GeneratedQuestions

    data = GeneratedQuestions(batch_size=2, train_size=6, val_size=6)
    with pytest.raises(ValueError, match=r"a label for each piece.*TokenClassificationData"):
        Trainer(**QUIET, max_steps=1).fit(tagger(tiny_bert), datamodule=data)


def test_generated_sentences_share_no_name():
    data = GeneratedSentences(train_size=150, val_size=150)
    names = {}
    for split in ("train", "val"):
        rows = data.rows(split)
        assert all(len(row["tokens"]) == len(row["tags"]) for row in rows)
        assert len({row["text"] for row in rows}) == 150
        words = {
            word
            for row in rows
            for word, tag in zip(row["tokens"], row["tags"], strict=True)
            if data.class_names[tag].endswith(("PER", "LOC"))
        }
        names[split] = words - {"New"}
    assert not names["train"] & names["val"]
    assert data.rows("train") == GeneratedSentences(train_size=150).rows("train")
