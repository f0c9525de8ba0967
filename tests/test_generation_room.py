"""Answers have room: a model's last position, and prompts without a token."""

import io
import json
import logging
import re

import pytest
import torch
from lightning.pytorch import Trainer
from test_cli import cli  # noqa: F401
from test_conventions import QUIET, causal
from test_data_text import cache, tiny_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
    XGLMForCausalLM,
)

from adaptrank.backbones import position_limit
from adaptrank.cli.answer_room import Room
from adaptrank.cli.prompt_form import EncodedPrompt
from adaptrank.data import CausalLMData, Seq2SeqData
from adaptrank.injection import adapt
from adaptrank.modules import Adapter, Seq2Seq
from adaptrank.modules.generation_room import cut_prompts, rows_with_room
from adaptrank.parameterizations import LoRA

__all__ = ["cache"]  # a fixture

GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "n_positions": 16}
MODELS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=50, **GPT2), 16),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=50,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        ),
        16,
    ),
    "roberta": (
        RobertaForCausalLM,
        RobertaConfig(vocab_size=50, max_position_embeddings=18, is_decoder=True, **BERT),
        16,
    ),
    "codegen": (
        CodeGenForCausalLM,
        CodeGenConfig(vocab_size=50, rotary_dim=4, **{**GPT2, "n_head": 4}),
        16,
    ),
    "ctrl": (CTRLLMHeadModel, CTRLConfig(vocab_size=50, dff=16, **GPT2), 16),
    "mpt": (
        MptForCausalLM,
        MptConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2, max_seq_len=16),
        16,
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(vocab_size=50, max_position_embeddings=16, **BERT),
        None,
    ),
    "bloom": (
        BloomForCausalLM,
        BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2),
        None,
    ),
    "xglm": (
        XGLMForCausalLM,
        XGLMConfig(
            vocab_size=50,
            d_model=16,
            num_layers=1,
            attention_heads=2,
            ffn_dim=16,
            max_position_embeddings=16,
        ),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_limit_is_the_last_position_that_a_model_reads(name):
    auto_class, config, limit = MODELS[name]
    model = auto_class(config).eval()
    assert position_limit(model) == limit

    def read(length):
        ids = torch.full((1, length), 5)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    read(16)
    if limit is None:
        read(17)
    else:
        with pytest.raises((IndexError, RuntimeError)):
            read(17)


def test_the_limits_of_encoders_and_decoders():
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=50, max_position_embeddings=16, **BART)
    )
    assert position_limit(bart, "encoder") == position_limit(bart, "decoder") == 16
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, **T5))
    assert position_limit(t5, "encoder") is position_limit(t5, "decoder") is None


def test_the_limit_is_found_under_an_adapter():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, **GPT2))
    adapt(model, ["wpe", "c_attn"], LoRA)
    assert position_limit(model) == 16


def test_prompts_share_the_positions_with_answers():
    ids = torch.arange(1, 13).repeat(3, 1)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    mask[2, :1] = 0
    kept, _ = cut_prompts(ids, mask, positions=16, most=4, bos=None)
    assert kept.shape == (3, 12), "12 + 4 - 1 positions are there"
    kept, kept_mask = cut_prompts(ids, mask, positions=12, most=4, bos=1)
    assert kept.tolist()[0] == [1, 5, 6, 7, 8, 9, 10, 11, 12], "the beginning token stays"
    assert kept.tolist()[2] == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert kept_mask.sum(1).tolist() == [9, 4, 9]
    kept, kept_mask = cut_prompts(ids, mask, positions=12, most=99, bos=None)
    assert kept.shape == (3, 6), "a prompt keeps half of the positions"
    assert rows_with_room(kept_mask, 12, 99) == [([0], 7), ([1], 9), ([2], 7)]
    assert rows_with_room(kept_mask, 12, 8) == [([1], 8), ([0], 7), ([2], 7)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def gpt2(folder, **settings):
    """Return the folder of a random GPT-2 of 16 positions, one token for each byte."""
    made = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(made), eos_token_id=0, bos_token_id=None, **{**GPT2, **settings}
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("most", [3, 24])
def test_fit_and_predict_stay_within_the_positions(most, tmp_path, caplog):
    long = {"prompt": "abcdefghijklmnopqrstuvwxyz", "completion": " x", "answer": "x"}
    short = {"prompt": "ab", "completion": " x", "answer": "x"}
    file = write(tmp_path / "a.jsonl", [long, short, long, short])
    module = causal(gpt2(tmp_path / "gpt2"))
    module.max_new_tokens = most
    data = CausalLMData(file, validation=file, predict=file, batch_size=4, max_length=16)
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, data)
    assert "exact_match" in trainer.callback_metrics
    [together] = trainer.predict(module, data)
    assert caplog.text.count("The model has 16 positions") == 1
    alone = CausalLMData(file, predict=file, batch_size=1, max_length=16)
    assert [row for batch in trainer.predict(module, alone) for row in batch] == together
    assert all(row["completion"] for row in together)


def test_examples_beyond_the_positions_are_refused_before_training(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "a" * 20, "completion": " x"}] * 2)
    module = causal(gpt2(tmp_path / "gpt2"))
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    said = r"An example has 23 tokens, and .*gpt2 has 16 positions. Set data.max_length to 16"
    with pytest.raises(ValueError, match=said):
        trainer.fit(module, CausalLMData(file, validation=file, max_length=30))


def test_targets_beyond_the_positions_are_refused_before_training(tiny_bart, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"source": "1 may", "target": "1" * 70}] * 2)
    module = Seq2Seq(tiny_bart, [Adapter([LoRA])], dtype="fp32")
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"64 positions. Set data.max_target_length to 64"):
        trainer.fit(module, Seq2SeqData(file, validation=file))


def test_prompts_that_fit_are_whole(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", [{"prompt": "abcdefghijklmn", "completion": " x"}] * 2)
    module = causal(gpt2(tmp_path / "gpt2"))
    data = CausalLMData(file, file, predict=file, max_length=16)
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.predict(module, data)
    assert "positions" not in caplog.text, "14 + 3 - 1 positions are there"


def test_texts_of_a_decoder_stay_within_its_positions(tiny_bart, tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", [{"source": "1 may", "target": "1/5"}] * 2)
    lora = [Adapter([LoRA])]
    module = Seq2Seq(tiny_bart, lora, max_new_tokens=99, dtype="fp32")
    # A random model may end at once.
    module.generation = {"min_new_tokens": 64}
    data = Seq2SeqData(file, validation=file, predict=file)
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, data)
    trainer.predict(module, data)
    assert caplog.text.count("The decoder has 64 positions") == 1


@pytest.fixture
def generate(cli):  # noqa: F811
    """Run `generate --json`, and return (exit code, lines of JSON, stderr)."""

    def run(*options):
        code, out, err = cli("generate", *options, "--json")
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def test_generate_stays_within_the_positions(tmp_path, generate, monkeypatch):
    folder = gpt2(tmp_path / "gpt2")
    options = ("--prompt", "abcd", "--prompt", "a" * 16, "--max_new_tokens", "100")
    code, rows, err = generate(folder, *options)
    assert code == 0
    assert len(rows) == 2
    assert err.count("The model has 16 positions") == 1
    assert "has at most 13 and not --max_new_tokens 100" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("abcd\n"))
    assert generate(folder, "--max_new_tokens", "100")[1][0] == rows[0]


def test_generate_keeps_the_end_of_a_text_that_is_too_long(tmp_path, generate):
    folder = gpt2(tmp_path / "gpt2")
    file = write(tmp_path / "a.jsonl", [{"prompt": "a"}, *[{"prompt": "b" * 9 + "a" * 14}] * 2])
    code, rows, err = generate(folder, "--file", file, "--max_new_tokens", "3")
    assert code == 0
    assert err.count("Row 1 of") == err.count("has 23 tokens, and the model has 16 positions") == 1
    assert "Its last 14 tokens are read" in err
    short = generate(folder, "--prompt", "a" * 14, "--max_new_tokens", "3")[1][0]
    assert rows[1]["completion"] == short["completion"]
    made = Room(16, 16, True, 3).fit(EncodedPrompt("", [1, *range(2, 22)], False), bos=1)
    assert made.prompt.ids == [1, *range(9, 22)], "the beginning token stays"


def test_generate_refuses_a_conversation_that_is_too_long(tmp_path, generate):
    folder = gpt2(tmp_path / "gpt2")
    turns = [{"role": "user", "content": "a" * 20}]
    file = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert generate(folder, "--file", file, "--max_new_tokens", "3")[0] == 0
    file = write(tmp_path / "b.jsonl", [{"messages": turns}])
    code, rows, err = generate(folder, "--file", file)
    assert (code, rows) == (2, [])
    assert re.search(r"Row 0 of .* tokens, and the model has 16 positions. Shorten it", err)
    assert "Traceback" not in err


def test_generate_with_a_decoder_stays_within_its_positions(tiny_bart, generate, monkeypatch):
    asked = []
    whole = GenerationMixin.generate

    def note(self, **options):
        asked.append(options["max_new_tokens"])
        return whole(self, **options)

    monkeypatch.setattr(GenerationMixin, "generate", note)
    code, _, err = generate(tiny_bart, "--prompt", "1 may", "--max_new_tokens", "99")
    assert (code, asked) == (0, [64]), err
    code, _, err = generate(tiny_bart, "--prompt", "1" * 80)
    assert code == 2
    assert "and the model has 64 positions" in err


# ---- prompts without a token


def empties(folder, *prompts):
    rows = [{"prompt": prompt, "completion": " x", "answer": "x"} for prompt in prompts]
    return write(folder / "a.jsonl", rows)


def test_predict_refuses_an_empty_prompt_with_its_row(tmp_path):
    file = empties(tmp_path, "ab", "", "")
    for predict in (file, None):
        data = CausalLMData(file, validation=file, predict=predict)
        data.tokenizer = tiny_tokenizer()
        said = r"Row 1 of the rows to predict has an empty prompt.*2 of 3 rows"
        with pytest.raises(ValueError, match=said):
            data.setup("predict")
        data.setup()
        with pytest.raises(ValueError, match=said):
            data.predict_dataloader()
    data = CausalLMData(file, validation=file, predict=file)
    data.tokenizer = tiny_tokenizer(bos=True)
    data.setup("predict")
    assert data.examples("predict")[1]["prompt_ids"].tolist() == [1], "its beginning token"


def test_a_source_without_a_token_is_refused_with_its_row(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"source": text, "target": "x"} for text in ("a", "")])
    data = Seq2SeqData(file, validation=file)
    data.tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="Row 1 of the train rows has an empty source"):
        data.setup("fit")


@pytest.mark.parametrize("prompts", [("", ""), ("", "ab", "", "ab")], ids=["all", "some"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_fit_trains_on_empty_prompts_and_generates_for_none(
    prompts, batch_size, tmp_path, caplog, monkeypatch
):
    asked = []
    whole = GenerationMixin.generate

    def note(self, input_ids, attention_mask, **options):
        asked.extend(attention_mask.sum(1).tolist())
        return whole(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(GenerationMixin, "generate", note)
    file = empties(tmp_path, *prompts)
    module = causal(gpt2(tmp_path / "gpt2"))
    data = CausalLMData(file, validation=file, batch_size=batch_size)
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, data)
    assert asked == [2] * prompts.count("ab")
    assert ("exact_match" in trainer.callback_metrics) == ("ab" in prompts)
    assert f"{prompts.count('')} of {len(prompts)} val rows have an empty prompt" in caplog.text


def test_a_batch_of_another_loader_with_an_empty_prompt_is_refused(tmp_path):
    module = causal(gpt2(tmp_path / "gpt2"))
    module.configure_model()
    ids = torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="A prompt is empty"):
        module.complete(ids, ids)
