"""Conventions of training that a model needs in use: class names, chat, prompts, ends, padding."""

import json
import re
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from adaptrank.artifacts import (
    conventions_of,
    load_adapter,
    merge,
    read_adapter,
    record_conventions,
    save_adapter,
)
from adaptrank.artifacts.conventions import agreed
from adaptrank.backbones import before_end
from adaptrank.cli.output import next_commands, quote
from adaptrank.cli.prompt_form import PromptForm
from adaptrank.cli.verbs.generate import stop_ids
from adaptrank.data import (
    ArithmeticProblems,
    CausalLMData,
    ClassificationData,
    GeneratedQuestions,
    end_of_turn,
    fill_prompt,
    gaps_of,
)
from adaptrank.data.class_names import merge_classes
from adaptrank.data.templates import chat_segments
from adaptrank.injection import adapt
from adaptrank.modules import Adapter, CausalLM, SequenceClassification
from adaptrank.parameterizations import LoRA

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}
WORDS = ["Say", "red", "blue", "Q", "A", ":", "user", "assistant", "system", "Be", "kind", "x"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def tokenizer(template=CHATML, special=True, **tokens):
    words = ["<unk>", "<eos>", "<|im_start|>", "<|im_end|>", *WORDS]
    words += [token for token in tokens.values() if token not in words]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>", model_max_length=64, **tokens
    )
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=special)
    made.chat_template = template
    return made


def save_base(folder, made, model=None):
    torch.manual_seed(0)
    if model is None:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=len(made),
                eos_token_id=1,
                bos_token_id=None,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a base model whose end token is not that of its chat template."""
    return save_base(tmp_path_factory.mktemp("base") / "llama", tokenizer())


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Folder of a decoder without a head, whose tokenizer has no padding token."""
    made = tokenizer()
    config = GPT2Config(
        vocab_size=len(made), n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    return save_base(tmp_path_factory.mktemp("base") / "gpt2", made, GPT2Model(config))


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def labelled(file, *labels):
    return write(file, [{"text": f"Say {w}", "label": w} for w in labels for _ in range(3)])


LORA = [Adapter([partial(LoRA, rank=2)])]


def causal(base, **arguments):
    arguments = {"adapters": LORA, "dtype": "fp32", "warmup": 0, **arguments}
    return CausalLM(base, max_new_tokens=3, **arguments)


def classifier(base, **arguments):
    arguments = {"adapters": LORA, "dtype": "fp32", "warmup": 0, **arguments}
    return SequenceClassification(base, **arguments)


def fit(module, data, **arguments):
    trainer = Trainer(**{**QUIET, "max_steps": 1, "limit_val_batches": 0, **arguments})
    trainer.fit(module, data)
    return module


def chat_data(folder, **arguments):
    rows = [{"prompt": "Say red", "completion": " red"}, {"prompt": "Say blue", "completion": " x"}]
    file = write(folder / "chat.jsonl", rows)
    return CausalLMData(file, validation=file, chat=True, batch_size=2, **arguments)


# ---- the end of a turn


@pytest.mark.parametrize("special", [True, False])
def test_a_turn_ends_with_the_token_of_the_template(special):
    made = tokenizer(special=special)
    messages = [
        {"role": "user", "content": "Say red"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Say <eos>"},
        {"role": "assistant", "content": " blue "},
    ]
    trained = [text for text, is_trained in chat_segments(made, messages) if is_trained]
    assert trained == ["red<|im_end|>", " blue <|im_end|>"]
    assert end_of_turn(made) == "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (CHATML, "red<|im_end|>"),
        ("{% for m in messages %}{{ m.content }}<eos>\n{% endfor %}", "red<eos>"),
        ("{% for m in messages %}{{ m.content }} <|im_end|> <eos>{% endfor %}", "red <|im_end|>"),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", "red\n\n"),
    ],
    ids=["another token", "the end token", "two tokens", "no token"],
)
def test_what_follows_the_end_is_not_trained_on(template, trained):
    made = tokenizer(template)
    messages = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "red"}]
    assert chat_segments(made, messages)[-1] == (trained, True)
    last = trained.split("red")[1].strip()
    assert end_of_turn(made) == (last or None)


def test_what_ends_a_turn_stops_generation_during_and_after_training(base, tmp_path):
    data = chat_data(tmp_path)
    module = fit(causal(base), data)
    assert data.examples("train")[0]["labels"].tolist()[-1] == 3
    assert module.model.generation_config.eos_token_id == [3, 1]
    assert module.model.config.eos_token_id == [3, 1]
    conventions = conventions_of(module.model)
    assert conventions == {
        "chat": True,
        "chat_template": CHATML,
        "stop_tokens": {"<|im_end|>": 3},
        "pad_token": {"<eos>": 1},
    }
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    assert read_adapter(tmp_path / "adapter")["conventions"] == conventions

    loaded = LlamaForCausalLM.from_pretrained(base)
    load_adapter(loaded, tmp_path / "adapter")
    assert loaded.generation_config.eos_token_id == [3, 1]
    assert stop_ids(loaded, AutoTokenizer.from_pretrained(base), chat=False) == [3, 1]
    again = save_adapter(loaded, tmp_path / "again")
    assert read_adapter(again)["conventions"] == conventions, "they travel on"
    merge(loaded).save_pretrained(tmp_path / "merged")
    merged = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert merged.eos_token_id == [3, 1]
    assert merged.pad_token_id == 1


def test_a_template_without_an_end_gets_the_end_token(tmp_path):
    made = tokenizer("{% for m in messages %}{{ m.role }} : {{ m.content }}\n{% endfor %}")
    data = chat_data(tmp_path)
    data.tokenizer = made
    data.setup("fit")
    assert data.examples("train")[0]["labels"].tolist()[-1] == made.eos_token_id
    assert data.conventions()["stop_tokens"] == {"<eos>": 1}


def test_a_plain_completion_ends_with_the_end_token_even_if_the_model_names_none(tmp_path):
    made = tokenizer()
    folder = save_base(tmp_path / "base", made)
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "base" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    file = write(tmp_path / "a.jsonl", [{"prompt": "Say", "completion": " red"}] * 2)
    module = fit(causal(folder), CausalLMData(file, validation=file, batch_size=2))
    assert module.model.generation_config.eos_token_id == 1
    assert conventions_of(module.model)["chat"] is False


def test_an_end_that_is_no_special_token_is_not_part_of_the_text(tmp_path):
    base = save_base(tmp_path / "base", tokenizer(special=False))
    module = fit(causal(base), chat_data(tmp_path))
    assert conventions_of(module.model)["stop_tokens"] == {"<|im_end|>": 3}
    assert before_end([5, 3, 6, 3], [3, 1]) == [5]
    assert before_end([5, 6], [3]) == [5, 6]
    ids = torch.tensor([[4, 5]])
    module.model.generate = lambda **_: torch.tensor([[4, 5, 6, 3, 7], [4, 5, 1, 1, 1]])
    assert module.complete(ids, torch.ones_like(ids)) == [module.tokenizer.decode([6]), ""]


def test_a_system_message_that_all_conversations_share_is_recorded(base, tmp_path):
    turns = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": [{"role": "system", "content": "Be kind"}, *turns]}] * 2
    data = CausalLMData(write(tmp_path / "a.jsonl", rows), validation=str(tmp_path / "a.jsonl"))
    data.tokenizer = tokenizer()
    data.setup("fit")
    assert data.conventions()["system"] == "Be kind"
    assert data.example_prompt == "Say"
    form = PromptForm(chat=True, system="Be kind")
    assert form.messages("Say") == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Say"},
    ]
    mixed = [*rows, {"messages": turns}]
    data = CausalLMData(write(tmp_path / "b.jsonl", mixed), validation=str(tmp_path / "b.jsonl"))
    data.tokenizer = tokenizer()
    data.setup("fit")
    assert "system" not in data.conventions()


def test_another_format_than_that_of_training_is_said_once(base, tmp_path, caplog):
    module = fit(causal(base), chat_data(tmp_path))
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    warm = causal(base, adapters=None, adapter=str(tmp_path / "adapter"), generate=False)
    plain = CausalLMData(str(tmp_path / "chat.jsonl"), validation=str(tmp_path / "chat.jsonl"))
    trainer = Trainer(**QUIET, max_steps=1)
    trainer.validate(warm, plain, verbose=False)
    trainer.validate(warm, plain, verbose=False)
    said = [r.getMessage() for r in caplog.records if "was trained with" in r.getMessage()]
    assert said == ["The adapter was trained with chat=True, and the data have False."]
    assert conventions_of(warm.model)["chat"] is True, "validation trains nothing"
    trainer.fit(warm, plain)
    assert conventions_of(warm.model)["chat"] is False
    assert conventions_of(warm.model)["stop_tokens"] == {"<|im_end|>": 3, "<eos>": 1}


# ---- prompts


def test_a_prompt_is_put_into_the_template_of_training():
    template = "Question: {question}\nAnswer:"
    filled = "Question: How many?\nAnswer:"
    assert gaps_of(template) == ["question"]
    assert fill_prompt(template, "How many?") == filled
    assert fill_prompt(template, filled) == filled, "it is whole already"
    assert fill_prompt(template, {"question": "How many?"}) == filled
    assert fill_prompt("{{x}} {a[b]} {c}", {"a[b]": 1, "c": "{d}"}) == "{x} 1 {d}"
    with pytest.raises(ValueError, match=r'Give its 2 texts as JSON, \{"a": "\.+", "b": "\.+"\}'):
        fill_prompt("{a} {b}", "one")
    with pytest.raises(ValueError, match="The text for 'b' is missing"):
        fill_prompt("{a} {b}", {"a": "one"})
    assert fill_prompt("{x.__class__}", "y") == "y", "nothing is evaluated"
    with pytest.raises(ValueError, match="asks for more than 10000 characters"):
        fill_prompt("{x:>999999999}", "y")


def test_a_template_is_filled_by_the_code_of_training():
    assert gaps_of("{price:{width}.2f} {name}") == ["price", "width", "name"]
    assert fill_prompt("p {price:.3f}", "1.1") == "p 1.100"
    values = {"price": 1.5, "width": 6, "name": True}
    assert fill_prompt("{price:{width}.2f} {name}", values) == "  1.50 true"
    assert fill_prompt("{options[text][1]}", {"options": {"text": ["a", "b"]}}) == "b"
    with pytest.raises(ValueError, match="The value for 'b' is null"):
        fill_prompt("{a} {b}", {"a": "one", "b": None})
    with pytest.raises(ValueError, match=r"'.2f' asks for a number, and 'one' is none"):
        fill_prompt("{a:.2f}", "one")
    with pytest.raises(ValueError, match=r"a list is no text"):
        fill_prompt("{a}", {"a": ["one"]})


@pytest.mark.parametrize(
    ("prompt", "recorded"),
    [("Q : {q}", "Q : {q}"), ("{q}", "{q}"), ("q", None), (None, None)],
)
def test_the_prompt_template_is_recorded(prompt, recorded, tmp_path):
    rows = [{"q": "Say red", "prompt": "Say", "completion": " red"}] * 3
    data = CausalLMData(write(tmp_path / "a.jsonl", rows), prompt=prompt)
    data.tokenizer = tokenizer()
    data.setup("fit")
    assert data.conventions().get("prompt") == recorded


# ---- class names


def test_classes_are_brought_together_by_name(caplog):
    assert merge_classes(["a", "b", "c"], ["c", "a"]) == ["a", "b", "c"]
    assert not caplog.records
    assert merge_classes(["a", "b", "c"], ["c", "d"]) == ["d", "b", "c"]
    assert "['a', 'b', 'c'], and the data have ['c', 'd']" in caplog.text
    assert "'d' has the output of 'a'" in caplog.text
    with pytest.raises(ValueError, match=r"\['a', 'b'\], and the data have \['a', 'b', 'c'\]"):
        merge_classes(["a", "b"], ["a", "b", "c"])


@pytest.mark.parametrize("kind", ["fewer", "declared in another order", "indices"])
def test_a_class_keeps_its_number_in_another_file(kind, decoder, tmp_path, caplog):
    data = ClassificationData(labelled(tmp_path / "a.jsonl", "blue", "red", "x"), batch_size=2)
    module = fit(classifier(decoder), data)
    assert data.class_names == ["blue", "red", "x"]
    assert module.model.config.id2label == {0: "blue", 1: "red", 2: "x"}
    assert module.model.config.label2id == {"blue": 0, "red": 1, "x": 2}
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())

    other = {
        "fewer": lambda: ClassificationData(labelled(tmp_path / "b.jsonl", "x", "red")),
        "declared in another order": lambda: ClassificationData(
            labelled(tmp_path / "b.jsonl", "x", "red"), classes=["x", "red", "blue"]
        ),
        "indices": lambda: ClassificationData(
            write(tmp_path / "b.jsonl", [{"text": "Say x", "label": 0}] * 9),
            classes=["x", "red", "blue"],
        ),
    }[kind]()
    warm = classifier(decoder, adapters=None, adapter=str(tmp_path / "adapter"))
    trainer = Trainer(**QUIET)
    trainer.validate(warm, other, verbose=False)
    wanted = {2} if kind == "indices" else {1, 2}
    examples = [*other.examples("train"), *other.examples("val")]
    labels = [example["label"] for example in other.examples("val")]
    assert {example["label"] for example in examples} == wanted
    assert warm.num_labels is None
    assert warm.class_names == ["blue", "red", "x"]
    assert not [r for r in caplog.records if "classes" in r.getMessage()]

    direct = ClassificationData(str(tmp_path / "b.jsonl"), classes=["blue", "red", "x"])
    if kind != "indices":
        trainer.validate(warm, direct, verbose=False)
        assert [example["label"] for example in direct.examples("val")] == labels


def test_another_module_makes_the_data_number_its_classes_anew(decoder, tmp_path):
    module = fit(classifier(decoder), ClassificationData(labelled(tmp_path / "a.jsonl", "x", "Q")))
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    data = ClassificationData(
        labelled(tmp_path / "b.jsonl", "x", "Q"), classes=["x", "Q"], val_fraction=0.5
    )
    fresh, warm = classifier(decoder), classifier(decoder, adapter=str(tmp_path / "adapter"))
    trainer = Trainer(**QUIET)
    trainer.validate(fresh, data, verbose=False)
    ours = [example["label"] for example in data.examples("val")]
    trainer.validate(warm, data, verbose=False)
    assert [1 - example["label"] for example in data.examples("val")] == ours
    assert warm.class_names == ["Q", "x"]


def test_more_new_classes_than_places_are_refused(decoder, tmp_path):
    module = fit(classifier(decoder), ClassificationData(labelled(tmp_path / "a.jsonl", "x", "Q")))
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    warm = classifier(decoder, adapters=None, adapter=str(tmp_path / "adapter"))
    data = ClassificationData(labelled(tmp_path / "b.jsonl", "x", "Q", "red"))
    with pytest.raises(ValueError, match=r"\['Q', 'x'\].*it has no place for \['red'\]"):
        fit(warm, data)


def test_a_checkpoint_does_not_go_on_with_other_classes(decoder, tmp_path):
    data = ClassificationData(labelled(tmp_path / "a.jsonl", "x", "Q"))
    trainer = Trainer(**QUIET, max_steps=1, limit_val_batches=0)
    trainer.fit(classifier(decoder), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    file = labelled(tmp_path / "b.jsonl", "x", "Q")
    for act in ("validate", "fit"):
        other = ClassificationData(file, classes=["x", "Q"])
        with pytest.raises(ValueError, match=r"classes are \[x, Q\] here and \[Q, x\] in the"):
            getattr(Trainer(**QUIET, max_steps=2), act)(
                classifier(decoder), other, ckpt_path=tmp_path / "run.ckpt", weights_only=True
            )
    same = ClassificationData(file, classes=["Q", "x"])
    Trainer(**QUIET).validate(
        classifier(decoder), same, ckpt_path=tmp_path / "run.ckpt", weights_only=True, verbose=False
    )


def test_prediction_needs_no_training_rows_and_names_the_classes_of_training(decoder, tmp_path):
    data = ClassificationData(labelled(tmp_path / "a.jsonl", "x", "Q"))
    module = fit(classifier(decoder), data)
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    texts = write(tmp_path / "new.jsonl", [{"text": "Say x"}, {"text": "Say Q"}])
    (tmp_path / "a.jsonl").unlink()
    later = ClassificationData(str(tmp_path / "a.jsonl"), predict=texts)
    warm = classifier(decoder, adapters=None, adapter=str(tmp_path / "adapter"))
    (batch,) = Trainer(**QUIET).predict(warm, later)
    assert len(batch) == 2
    assert later.model_classes == ["Q", "x"]


# ---- padding


def test_a_decoder_pools_where_the_tokenizer_pads(decoder, tmp_path):
    data = ClassificationData(labelled(tmp_path / "a.jsonl", "x", "Q"), batch_size=2)
    module = fit(classifier(decoder), data)
    assert module.model.config.pad_token_id == module.tokenizer.pad_token_id == 1
    module.eval()
    one = module.tokenizer(["Say x"], return_tensors="pt")
    two = module.tokenizer(["Say x", "Say x Q A red"], return_tensors="pt", padding=True)
    with torch.no_grad():
        alone = module(dict(one))
        beside = module(dict(two))[0]
    torch.testing.assert_close(alone[0], beside)


def test_a_merged_classifier_has_its_names_and_its_padding(decoder, tmp_path, capsys):
    from adaptrank.cli.dispatch import main

    data = ClassificationData(labelled(tmp_path / "a.jsonl", "x", "Q"), batch_size=2)
    module = fit(classifier(decoder), data)
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "Q", 1: "x"}
    assert merged.config.label2id == {"Q": 0, "x": 1}
    assert merged.config.pad_token_id == 1
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokens(["Say x", "Say x Q A red"], return_tensors="pt", padding=True)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, module(dict(batch)))


def test_a_tokenizer_with_neither_padding_nor_end_still_pads(tmp_path):
    from adaptrank.backbones import load_tokenizer, resolve

    made = tokenizer()
    made.eos_token = None
    folder = save_base(tmp_path / "base", made)
    loaded = load_tokenizer(resolve(folder))
    assert loaded.pad_token == "<unk>"


# ---- more tokens than the model has


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory):
    """Folder of a model with two tokens fewer than its tokenizer, and tied embeddings."""
    made = tokenizer()
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(made), eos_token_id=1, bos_token_id=None,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    made.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    return save_base(tmp_path_factory.mktemp("base") / "small", made, model)


def test_a_token_without_an_embedding_is_refused_before_training(small_vocabulary, tmp_path):
    rows = [{"prompt": "Say", "completion": " <tool> x </tool>"}] * 4
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"has 18 tokens, and the model has 16.*'</tool>' \(17\)"):
        fit(causal(small_vocabulary), CausalLMData(file, validation=file))
    plain = write(tmp_path / "b.jsonl", [{"prompt": "Say", "completion": " x"}] * 4)
    fit(causal(small_vocabulary), CausalLMData(plain, validation=plain))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_new_tokens_train_and_are_saved_as_the_user_says(dtype, small_vocabulary, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "Say", "completion": " <tool> x"}] * 4)
    data = CausalLMData(file, validation=file, batch_size=2)
    optimizer = partial(torch.optim.AdamW, lr=0.1)
    module = causal(small_vocabulary, dtype=dtype, resize_tokens=True, optimizer=optimizer)
    fit(module, data)
    assert module.model.get_input_embeddings().weight.shape[0] == 18
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())

    from adaptrank.cli.loading import find_model

    ids = torch.tensor([[4, 16, 15]])
    with torch.no_grad():
        expected = module.eval().model(ids).logits
        stored = find_model(str(tmp_path / "adapter"), None).load(torch.float32)
        if dtype == "fp32":
            torch.testing.assert_close(stored(ids).logits, expected)
        warm = causal(
            small_vocabulary, dtype=dtype, adapters=None, adapter=str(tmp_path / "adapter")
        )
        warm.configure_model()
        torch.testing.assert_close(warm.eval().model(ids).logits, expected)
    assert warm.describe_base()["vocabulary"] == 18


# ---- the record


def test_what_adapters_share_is_recorded_and_what_differs_is_not(base, tmp_path):
    model = LlamaForCausalLM.from_pretrained(base)
    adapt(model, ["q_proj"], LoRA, name="a")
    adapt(model, ["q_proj"], LoRA, name="b")
    record_conventions(model, {"chat": True, "prompt": "{x}"}, ["a"])
    record_conventions(model, {"chat": True, "prompt": "{y}"}, ["b"])
    assert conventions_of(model) == {"chat": True}
    assert conventions_of(model, ["b"]) == {"chat": True, "prompt": "{y}"}
    saved = save_adapter(model, tmp_path, names=["a"])
    assert read_adapter(saved)["conventions"] == {"chat": True, "prompt": "{x}"}
    assert agreed([]) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"class_names": ["a", "a"]},
        {"class_names": "ab"},
        {"chat": "yes"},
        {"chat_template": 3},
        {"prompt": "x" * 200_000},
        {"columns": {"prompt": "x"}},
        {"columns": [{"prompt": 3}]},
        {"columns": [{"null_is_empty": "yes"}]},
        {"stop_tokens": {"</s>": -1}},
        {"stop_tokens": [1]},
        {"pad_token": {"<pad>": 1 << 50}},
        {"fields": "text_pair"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_record_of_another_form_is_refused(wrong, base, tmp_path):
    model = adapt(LlamaForCausalLM.from_pretrained(base), ["q_proj"], LoRA)
    model.__dict__["_adaptrank_conventions"] = {"default": wrong}
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"is damaged: .*conventions"):
        read_adapter(tmp_path)


def test_ids_beyond_the_vocabulary_are_not_set(base):
    model = adapt(LlamaForCausalLM.from_pretrained(base), ["q_proj"], LoRA)
    record_conventions(model, {"stop_tokens": {"x": 10**6}, "pad_token": {"y": 10**6}})
    assert model.generation_config.eos_token_id == 1
    assert model.config.pad_token_id is None


# ---- the command line


@pytest.fixture(scope="module")
def chat_adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    module = fit(causal(base), chat_data(folder))
    return save_adapter(module.model, folder / "adapter", module.describe_base())


def test_generate_and_merge_use_what_training_used(chat_adapter, base, tmp_path, capsys):
    from adaptrank.cli.dispatch import main

    merged = tmp_path / "merged"
    main(["merge", str(chat_adapter), "--out", str(merged)])
    assert json.loads((merged / "config.json").read_text())["adaptrank"] == {"chat": True}
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [3, 1]
    assert AutoTokenizer.from_pretrained(merged).chat_template == CHATML

    def said(*options):
        capsys.readouterr()
        main(["generate", *map(str, options), "--prompt", "Say red", "--max_new_tokens", "3"])
        return capsys.readouterr().out

    by_default = said(chat_adapter)
    assert by_default == said(chat_adapter, "--chat") == said(merged)
    assert not by_default.startswith("Say red"), "a chat shows the reply alone"
    for plain in (said(chat_adapter, "--no-chat"), said(chat_adapter, "--raw"), said(base)):
        assert plain.startswith("Say red")


def test_the_recorded_chat_template_replaces_that_of_the_base(chat_adapter, base, tmp_path, caplog):
    from adaptrank.cli.loading import find_model

    stored = find_model(str(chat_adapter), base)
    assert stored.tokenizer().chat_template == CHATML
    assert not caplog.records
    stored.conventions = {**stored.conventions, "chat_template": "{{ messages }}"}
    assert stored.tokenizer().chat_template == "{{ messages }}"
    assert "is not the one of training" in caplog.text


def test_the_next_command_is_the_one_of_this_run(base, decoder, tmp_path):
    data = chat_data(tmp_path)
    module = fit(causal(base), data)
    (tmp_path / "config.yaml").touch()
    assert re.search(r'generate \S+ --prompt "Say red" --chat$', next_commands(
        tmp_path, module, data), re.MULTILINE)  # fmt: skip
    rows = [{"q": "Say red", "completion": " red"}] * 3
    data = CausalLMData(write(tmp_path / "q.jsonl", rows), prompt="Q : {q}\nA :")
    module = fit(causal(base), data)
    commands = next_commands(tmp_path, module, data)
    assert r'--prompt "Q : Say red\nA :"' + "\n" in commands
    assert "predict" not in commands

    for data, file in (
        (ClassificationData(labelled(tmp_path / "a.jsonl", "x", "Q")), " --data.predict FILE"),
        (GeneratedQuestions(train_size=12, val_size=6), ""),
    ):
        commands = next_commands(tmp_path, fit(classifier(decoder), data), data)
        assert "generate" not in commands
        assert re.search(rf"predict: .*config\.yaml --model\.adapter \S+{file}$", commands, re.M)
    assert ArithmeticProblems().example_prompt.startswith("Question: Ann has 12 pears")


def test_the_file_of_the_next_command_has_a_whole_prompt(base, tmp_path):
    rows = [{"prompt": "Say \\nred", "completion": " red"}] * 3
    data = CausalLMData(write(tmp_path / "p.jsonl", rows), prompt="Q : {prompt}\nA :")
    (tmp_path / "config.yaml").touch()
    commands = next_commands(tmp_path, fit(causal(base), data), data)
    assert re.search(r"generate \S+ --file \S+prompts.jsonl --raw$", commands, re.MULTILINE)
    written = json.loads((tmp_path / "prompts.jsonl").read_text())
    assert written == {"prompt": "Q : Say \\nred\nA :"}


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("a b\nc", '"a b\\nc"'),
        ("cost $5", "'cost $5'"),
        ('say "x"', "'say \"x\"'"),
        ("end\\", "'end\\'"),
    ],
)
def test_prompts_are_quoted_for_a_shell(text, quoted):
    assert quote(text) == quoted
