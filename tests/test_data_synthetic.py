"""Made data: what it promises about numbers, templates, tokens and classes."""

import math
import re
from collections import Counter

import pytest
import torch
from lightning import LightningModule, Trainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from adaptrank.data import ArithmeticProblems, GeneratedQuestions
from adaptrank.data.arithmetic_problems import (
    TRAIN_PROBLEMS,
    VALIDATION_PROBLEMS,
    draw_distinct,
)
from adaptrank.data.generated_questions import TRAIN_QUESTIONS, VALIDATION_QUESTIONS


def tiny_tokenizer():
    """One token a byte, whose end is also its padding."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<end>", *sorted(alphabet)])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def numbers(row):
    return [int(n) for n in re.findall(r"\d+", row["prompt"])]


@pytest.fixture(scope="module", params=[0, 1])
def problems(request):
    data = ArithmeticProblems(train_size=1500, val_size=300, seed=request.param)
    return data.rows("train"), data.rows("val")


def test_there_are_many_templates_and_none_is_on_both_sides():
    train = [t for texts in TRAIN_PROBLEMS.values() for t in texts]
    val = [t for texts in VALIDATION_PROBLEMS.values() for t in texts]
    assert len(train) + len(val) >= 24
    assert len(set(train + val)) == len(train) + len(val)
    assert set(TRAIN_PROBLEMS) == set(VALIDATION_PROBLEMS)


def test_problems_are_solved_rightly_and_their_numbers_are_those_of_the_question(problems):
    for rows in problems:
        assert len({row["prompt"] for row in rows}) == len(rows)
        for row in rows:
            expression, value = row["completion"].split(" = ")
            assert row["completion"].startswith(" ")
            assert value == row["answer"]
            assert eval(expression) == int(value) > 0
            assert sorted(numbers(row)) == sorted(int(n) for n in re.findall(r"\d+", expression))
            assert re.fullmatch(r"Question: [A-Z0-9].*\nAnswer:", row["prompt"])
            assert "{" not in row["prompt"]


def test_no_number_is_in_the_problems_of_both_sides(problems):
    train, val = problems
    assert not {n for row in train for n in numbers(row)} & {n for row in val for n in numbers(row)}


def test_a_problem_has_at_most_40_tokens(problems):
    """Estimated: one token for a word, a mark, a line break, a digit, a space before a number."""
    for rows in problems:
        for row in rows:
            text = row["prompt"] + row["completion"]
            assert len(re.findall(r"[A-Za-z]+|\d| (?=\d)|[^\w\s]|\n", text)) + 1 <= 40, text


def test_the_seed_decides_everything():
    def make(seed):
        return [ArithmeticProblems(50, 20, seed=seed).rows(split) for split in ("train", "val")]

    assert make(3) == make(3)
    assert make(3) != make(4)


def test_more_rows_than_there_are():
    with pytest.raises(ValueError, match="train_size=3, but only about 1 different"):
        draw_distinct(lambda: {"prompt": "same"}, "prompt", 3, "train_size")
    with pytest.raises(
        ValueError, match=r"val_size=400 asks for more questions than there are\. Use 96"
    ):
        GeneratedQuestions(val_size=400).rows("val")


def test_questions_are_balanced_and_share_no_template():
    data = GeneratedQuestions()
    assert data.num_classes == len(data.class_names) == 6
    for split, size in (("train", 120), ("val", 72)):
        rows = data.rows(split)
        assert set(Counter(row["label"] for row in rows).values()) == {size // 6}
        assert len({row["text"] for row in rows}) == size
    train = {t for texts in TRAIN_QUESTIONS.values() for t in texts}
    assert not train & {t for texts in VALIDATION_QUESTIONS.values() for t in texts}


def test_a_bag_of_words_learns_the_training_questions_and_fails_on_the_others():
    data = GeneratedQuestions()

    def words(text):
        return re.findall(r"\w+", text.lower())

    counts = [Counter() for _ in data.class_names]
    for row in data.rows("train"):
        counts[row["label"]].update(words(row["text"]))
    vocabulary = len(set().union(*counts))

    def predict(text):
        scores = [
            sum(math.log((c[w] + 1) / (c.total() + vocabulary)) for w in words(text))
            for c in counts
        ]
        return scores.index(max(scores))

    right = {
        s: sum(predict(r["text"]) == r["label"] for r in data.rows(s)) / len(data.rows(s))
        for s in ("train", "val")
    }
    assert right["train"] > 0.9
    assert right["val"] < 0.45


class Model(LightningModule):
    """Takes what a task gives, and remembers it."""

    def __init__(self):
        super().__init__()
        self.layer, self.tokenizer, self.batches = (
            nn.Linear(1, 1),
            tiny_tokenizer(),
            {"train": [], "val": [], "predict": []},
        )

    def configure_model(self):
        self.classes = self.trainer.datamodule.num_classes

    def training_step(self, batch, batch_idx):
        self.batches["train"].append(batch)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.batches["val"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.batches["predict"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(data, **options):
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    }
    trainer = Trainer(enable_model_summary=False, num_sanity_val_steps=0, **settings, **options)
    model = Model()
    trainer.fit(model, data)
    return model, trainer


@pytest.mark.filterwarnings("ignore:.*workers.*:UserWarning")
def test_a_trainer_gets_the_batches_of_the_contract():
    data = ArithmeticProblems(
        train_size=20, val_size=6, batch_size=4, eval_batch_size=3, max_length=200
    )
    model, trainer = run(data, max_epochs=2)
    assert data.tokenizer is model.tokenizer
    assert [len(model.batches[k]) for k in ("train", "val")] == [10, 4]
    assert set(model.batches["train"][0]) == {"input_ids", "attention_mask", "labels"}
    val = model.batches["val"][0]
    assert set(val) == {
        "input_ids",
        "attention_mask",
        "labels",
        "prompt_ids",
        "prompt_mask",
        "answers",
    }
    assert val["answers"] == [row["answer"] for row in data.rows("val")[:3]]
    decode = model.tokenizer.decode
    kept = val["labels"][0][val["labels"][0] != -100]
    assert decode(kept) == data.rows("val")[0]["completion"] + "<end>"
    assert decode(val["prompt_ids"][0][val["prompt_mask"][0] == 1]) == data.rows("val")[0]["prompt"]
    assert val["labels"].shape == val["input_ids"].shape == val["attention_mask"].shape
    assert model.classes is None
    trainer.predict(model, data)
    assert model.batches["predict"][0]["prompts"] == [row["prompt"] for row in data.rows("val")[:3]]
    assert set(model.batches["predict"][0]) == {"prompt_ids", "prompt_mask", "prompts"}


def test_classes_are_known_before_the_model_is_configured():
    model, _ = run(GeneratedQuestions(batch_size=16, max_length=60), max_epochs=1)
    assert model.classes == 6
    assert set(model.batches["train"][0]) >= {"input_ids", "attention_mask", "labels"}


@pytest.mark.filterwarnings("ignore:.*overfit.*:UserWarning")
def test_overfitting_sees_the_same_batches_in_every_epoch():
    model, _ = run(ArithmeticProblems(20, 6, batch_size=4), max_epochs=2, overfit_batches=2)
    a, b = model.batches["train"][:2], model.batches["train"][2:]
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, b, strict=True))


def test_processes_share_the_rows(monkeypatch):
    """The strategy's processes decide the shares, and the Trainer has no sampler to replace."""
    model = Model()
    shares = []
    for rank in range(2):
        data = ArithmeticProblems(19, 5, batch_size=4, max_length=200)
        data.tokenizer = model.tokenizer
        data.setup()
        data.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        monkeypatch.setattr(
            Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": rank}
        )
        loader = data.train_dataloader()
        assert len(loader) == 3
        shares.append(
            [row for batch in loader for row in model.tokenizer.batch_decode(batch["input_ids"])]
        )
    assert not {t.rstrip("<end>") for t in shares[0]} & {t.rstrip("<end>") for t in shares[1]}
    assert len(shares[0]) + len(shares[1]) == 19


def test_sizes_and_tokenizer_are_asked_for():
    with pytest.raises(ValueError, match="batch_size=0"):
        ArithmeticProblems(batch_size=0)
    with pytest.raises(ValueError, match="max_length=1"):
        ArithmeticProblems(max_length=1)
    with pytest.raises(ValueError, match="found no tokenizer"):
        ArithmeticProblems().setup("fit")
