"""Large inputs: long texts are cut before they are tokenized, and generated sets are lazy."""

import itertools
import json
import logging
import pickle
import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adaptrank.data import (
    ArithmeticProblems,
    BatchOrder,
    CausalLMData,
    ClassificationData,
    GeneratedQuestions,
    Source,
)
from adaptrank.data.arithmetic_problems import (
    LARGEST_LIST,
    TRAIN_PROBLEMS,
    all_operands,
    draw_operands,
    is_validation_number,
)
from adaptrank.data.batch_order import lazy_rounds, rounds
from adaptrank.data.lazy import Permutation
from adaptrank.data.seeding import seeded_random
from adaptrank.data.shortening import LARGEST, Shortener

WORDS = [
    *("the", "of", "low", "rank", "update", "weights", "matrix", "zürich", "日本", "naïve"),
    *("a", "I", "it's", "12", "2024", "3.14", "...", "(x)", "123", "456", "712", "345", "671"),
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def prose(count, seed=0):
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(count))


def wrap(tokenizer, **options):
    special = {"eos_token": "<end>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT, **special, **options
    )


def trained(model, trainer, before=None, normalizer=None):
    tokenizer = Tokenizer(model)
    if before is not None:
        tokenizer.pre_tokenizer = before
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([prose(2000, 7)], trainer)
    return wrap(tokenizer)


def bpe(before, normalizer=None, alphabet=()):
    special = ["<unk>", "<s>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    return trained(models.BPE(unk_token="<unk>"), trainer, before, normalizer)


def byte_level(*before):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    return bpe(
        pre_tokenizers.Sequence([*before, last]), alphabet=pre_tokenizers.ByteLevel.alphabet()
    )


def of_bytes():
    return byte_level()


def of_bytes_and_groups_of_digits():
    groups = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    return byte_level(pre_tokenizers.Split(groups, "isolated"))


def of_words_and_marks():
    return bpe(pre_tokenizers.Metaspace())


def without_pre_tokenizer():
    """Like older sentence pieces: the text is one piece, and a space is a mark in it."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = bpe(pre_tokenizers.Metaspace())
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def of_several_words():
    """Tokens go across words."""
    return bpe(None, normalizers.Replace(" ", "▁"))


def of_word_pieces():
    special = ["<unk>", "<s>", "<end>"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    model = models.WordPiece(unk_token="<unk>", max_input_chars_per_word=20)
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


def of_probable_pieces():
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=["<unk>", "<s>", "<end>"],
        unk_token="<unk>",
        show_progress=False,
    )
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())


TOKENIZERS = [
    of_bytes,
    of_bytes_and_groups_of_digits,
    of_words_and_marks,
    without_pre_tokenizer,
    of_several_words,
    of_word_pieces,
    of_probable_pieces,
]
TEXTS = {
    "prose": prose(300),
    "one word": "rank" * 400,
    "digits": "1234567" * 230,
    "spaces": "low" + " " * 900 + "rank " * 120,
    "no spaces": "日本語文字列" * 80,
    "lines": "\n\n".join(prose(12, seed) for seed in range(20)),
    "half": "matrix" * 120 + " " + prose(140),
}


@pytest.fixture(scope="module", params=TOKENIZERS, ids=lambda make: make.__name__)
def tokenizer(request):
    return request.param()


def encoded(data, rows, split):
    """Examples as plain lists, and the number of rows that were cut."""
    examples = [
        {key: value.tolist() if torch.is_tensor(value) else value for key, value in row.items()}
        for row in data.encode(rows, split)
    ]
    return examples, data.truncated.get(split)


def with_and_without_cut(data, tokenizer, rows, split, monkeypatch):
    data.tokenizer = tokenizer
    short = encoded(data, rows, split)
    with monkeypatch.context() as patch:
        patch.setattr(Shortener, "is_long", lambda self, texts: False)
        patch.setattr(Shortener, "_shorten", lambda self, text, *_: text)
        whole = encoded(data, rows, split)
    return short, whole


@pytest.mark.parametrize("text", TEXTS)
def test_a_cut_text_gives_the_tokens_of_the_whole_text(text, tokenizer, monkeypatch):
    long = TEXTS[text]
    # Small windows, so that small texts are long.
    monkeypatch.setattr("adaptrank.data.shortening.SPARE_CHARACTERS", 64)
    monkeypatch.setattr("adaptrank.data.shortening.SPARE_TOKENS", 24)
    rows = [
        {"prompt": long, "completion": " yes"},
        {"prompt": "short:", "completion": " " + long},
        {"prompt": long + ":", "completion": " " + long},
        {"prompt": "short:", "completion": " no"},
    ]
    for chat in (False, True):
        data = CausalLMData("unused.csv", max_length=12, chat=chat)
        for split in ("train", "predict"):
            short, whole = with_and_without_cut(data, tokenizer, rows, split, monkeypatch)
            assert short == whole, (chat, split)
    turns = [long, "ok", "why? " + long, long, "low", "rank"]
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": next(roles), "content": turn} for turn in turns]
    short, whole = with_and_without_cut(
        data, tokenizer, [{"messages": messages}], "train", monkeypatch
    )
    assert short == whole
    # A tokenizer keeps every pair of what it cuts off, so that longer pairs need gigabytes.
    both = (long[:350], long[-350:])
    pairs = [("low", long), (long, "low"), both, (long, ""), ("low", "rank")]
    rows = [{"text": a, "text_pair": b, "label": 0} for a, b in pairs]
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        data = ClassificationData("unused.csv", max_length=12)
        short, whole = with_and_without_cut(data, tokenizer, rows, "train", monkeypatch)
        assert short == whole, side
    tokenizer.truncation_side = "right"


def test_choices_after_a_long_prompt(monkeypatch):
    rows = [{"prompt": prose(3000), "choices": ["yes", prose(900)], "label": 0, "completion": " y"}]
    data = CausalLMData("unused.csv", max_length=24)
    short, whole = with_and_without_cut(data, of_bytes(), rows, "val", monkeypatch)
    plain = [[c["input_ids"].tolist() for c in rows[0]["choices"]] for rows, _ in (short, whole)]
    assert plain[0] == plain[1]


def test_only_a_part_of_a_long_text_is_tokenized(monkeypatch):
    """Memory is bounded: no call of the tokenizer sees more than a few windows."""
    tokenizer = of_bytes()
    sizes = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self, texts, *args, **options):
        sizes.append(sum(map(len, texts)))
        return call(self, texts, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    data = CausalLMData("unused.csv", max_length=24)
    data.tokenizer = tokenizer
    long = "word " * 1_000_000
    data.encode([{"prompt": long, "completion": long}], "train")
    assert max(sizes) < 10_000
    labels = ClassificationData("unused.csv", max_length=24)
    labels.tokenizer = tokenizer
    labels.encode([{"text": long, "text_pair": long, "label": 0}], "train")
    assert max(sizes) < 10_000
    monkeypatch.setattr("adaptrank.data.segments.CHARACTERS_AT_ONCE", 5000)
    del sizes[:]
    data.encode([{"prompt": "p" * 1000, "completion": "c"}] * 20, "predict")
    assert sizes == [5000] * 4


def test_a_text_without_a_place_to_cut_says_so(monkeypatch, caplog):
    monkeypatch.setattr("adaptrank.data.shortening.LARGEST", 4000)
    data = CausalLMData("unused.csv", max_length=24)
    data.tokenizer = of_bytes_and_groups_of_digits()
    with caplog.at_level(logging.WARNING, "adaptrank"):
        [example] = data.encode([{"prompt": "1234567" * 9000, "completion": " x"}], "train")
    assert "A text of 63000 characters has no space between words to be cut at" in caplog.text
    assert len(example["input_ids"]) == 24
    assert LARGEST > 100_000


# ---- lazy sets


def test_a_permutation_holds_every_index_once():
    for n in (1, 2, 3, 10, 257, 1000):
        assert sorted(Permutation(n, "a")) == list(range(n))
    assert list(Permutation(50, "a")) == list(Permutation(50, "a")) != list(Permutation(50, "b"))
    with pytest.raises(IndexError):
        Permutation(3, "a")[3]
    ascents = sum(a < b for a, b in itertools.pairwise(Permutation(4000, "a")))
    assert abs(ascents - 2000) < 100


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 16, 17, 50])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_lazy_rounds_are_dealt_like_the_others(n, batch_size, world_size):
    plain = rounds(n, batch_size, shuffle=False, world_size=world_size)
    lazy = list(lazy_rounds(n, batch_size, shuffle=False, world_size=world_size))
    assert lazy == plain
    shuffled = list(lazy_rounds(n, batch_size, seed=3, epoch=1, world_size=world_size))
    assert [list(map(len, batches)) for batches in shuffled] == [
        list(map(len, batches)) for batches in plain
    ]
    seen = {i for batches in shuffled for batch in batches for i in batch}
    assert seen == set(range(n))
    rest = lazy_rounds(n, batch_size, seed=3, epoch=1, world_size=world_size, start=1)
    assert list(rest) == shuffled[1:]


@pytest.fixture(scope="module")
def vast():
    return ArithmeticProblems(train_size=10**8, val_size=10**8, batch_size=4, max_length=200)


def test_a_vast_generated_set_takes_no_memory(vast, caplog):
    vast.tokenizer = of_bytes()
    with caplog.at_level(logging.WARNING, "adaptrank"):
        vast.setup("fit")
    assert "each occurs 21 times or once more" in caplog.text
    rows = vast.rows("train")
    assert len(rows) == len(vast.examples("train")) == 10**8
    assert rows[0] == rows[-(10**8)] != rows[1]
    order = Permutation(4_549_062, "arithmetic", "train", 0)
    assert len(rows.compute.space) == len(order)
    assert rows[4_549_062] == rows[0], "a problem occurs again after all have occurred"
    loader = vast.train_dataloader()
    assert len(loader) == 25_000_000
    first = [batch["input_ids"] for batch in itertools.islice(loader, 3)]
    again = vast.train_dataloader()
    again.load_state_dict({"epoch": 0, "position": 2, "order": loader.batch_sampler.fingerprint()})
    assert torch.equal(next(iter(again))["input_ids"], first[2])
    with pytest.raises(ValueError, match="group_by_length needs the length of all 100000000"):
        vast.make_loader("train", 4, group_by_length=True)
    pickle.dumps(vast.examples("train"))


def test_vast_sets_keep_what_small_ones_promise(vast):
    for split in ("train", "val"):
        rows = vast.rows(split)[:500]
        assert len({row["prompt"] for row in rows}) == 500
        for row in rows:
            expression, value = row["completion"].split(" = ")
            assert eval(expression) == int(value) == int(row["answer"]) > 0
            numbers = [int(n) for n in row["prompt"].replace(".", " ").split() if n.isdigit()]
            assert all(is_validation_number(n) is (split == "val") for n in numbers)


def test_all_problems_of_a_space_differ(vast):
    rows = vast.rows("val")
    prompts = {rows.compute.space.row(k)["prompt"] for k in range(0, 162_992, 7)}
    assert len(prompts) == len(range(0, 162_992, 7))
    for form in TRAIN_PROBLEMS:
        operands = all_operands(form, validation=False)
        generator = seeded_random(form)
        drawn = {draw_operands(form, generator, validation=False) for _ in range(300)}
        with_c = "{c}" in form
        assert {d if with_c else d[:2] for d in drawn} <= {o if with_c else o[:2] for o in operands}


def test_a_limit_of_a_vast_set_is_a_list(vast):
    data = ArithmeticProblems(train_size=10**8, limit_train=5, max_length=200)
    data.tokenizer = of_bytes()
    data.setup("fit")
    assert isinstance(data.examples("train"), list)
    assert len(data.examples("train")) == 5
    assert min(LARGEST_LIST.values()) > 2000, "the defaults are drawn as ever"


def test_cuts_of_a_lazy_set_are_counted_as_they_are_read(caplog):
    data = ArithmeticProblems(train_size=10**8, max_length=8, batch_size=2)
    data.tokenizer = of_bytes()
    with caplog.at_level(logging.WARNING, "adaptrank"):
        data.setup("fit")
        list(itertools.islice(data.train_dataloader(), 3))
    assert data.truncated["train"] == 1 + 6, "the first row is looked at in the setup"
    assert data._kinds == {False}
    assert caplog.text.count("train rows exceed max_length=8") == 1


def test_a_lazy_order_knows_no_lengths():
    with pytest.raises(ValueError, match="knows no lengths"):
        BatchOrder(2, 1, lazy=True, lengths=[1, 2])
    assert BatchOrder(2, 1, lazy=True).fingerprint()["lazy"]
    assert "lazy" not in BatchOrder(2, 1).fingerprint()


# ---- values that make no sense


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size=0 leaves no example. Use 1 or more."),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"batch_size": 2.5}, "batch_size=2.5 is no whole number"),
        ({"batch_size": True}, "batch_size=True is no whole number"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": float("nan")}, "max_length=nan is no whole number"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"limit_train": 0}, "limit_train=0"),
        ({"limit_val": -1}, "limit_val=-1"),
    ],
)
def test_sizes_that_make_no_sense(options, says):
    for make in (
        lambda **options: CausalLMData("a.csv", **options),
        lambda **options: ClassificationData("a.csv", **options),
        ArithmeticProblems,
        GeneratedQuestions,
    ):
        with pytest.raises(ValueError, match=says.replace(".", r"\.")):
            make(**options)


@pytest.mark.parametrize("make", [ArithmeticProblems, GeneratedQuestions])
@pytest.mark.parametrize("name", ["train_size", "val_size"])
@pytest.mark.parametrize("size", [0, -5, 1.5])
def test_generated_sets_of_no_size(make, name, size):
    with pytest.raises(ValueError, match=f"{name}={size}"):
        make(**{name: size})


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [CausalLMData, ClassificationData])
def test_shares_and_weights_that_make_no_sense(make, value, tmp_path):
    with pytest.raises(ValueError, match=f"val_fraction={value}"):
        make("a.csv", val_fraction=value)
    if not 0 < value < float("inf"):
        for key in ("sources", "validation"):
            sources = {"sources": "a.csv", key: [Source("a.csv", weight=value)]}
            with pytest.raises(ValueError, match=f"weight={value} takes no row"):
                make(**sources)


def test_classes_have_different_names(tmp_path):
    with pytest.raises(ValueError, match="names a class twice"):
        ClassificationData("a.csv", classes=["a", "a"])
    (tmp_path / "labels.json").write_text(json.dumps(["a", "a"]))
    (tmp_path / "a.csv").write_text("text,label\nx,a\n")
    with pytest.raises(ValueError, match="names a class twice"):
        ClassificationData(str(tmp_path / "a.csv"), str(tmp_path / "a.csv")).rows("train")
