"""`generate --file` makes the prompts that training and `predict` make of the same file."""

import gzip
import io
import json
import re

import pytest
import torch
from datasets import Dataset
from test_cli import cli  # noqa: F401
from test_data_formats import ALPACA, OPENAI, SHAREGPT, TURNS
from test_data_text import cache, tiny_tokenizer
from test_data_text import ready as ready_with
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
)

from adaptrank.artifacts import record_conventions, save_adapter
from adaptrank.cli.dispatch import main
from adaptrank.data import CausalLMData, Seq2SeqData, Source
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA

__all__ = ["cache"]  # a fixture


CHAT = (
    "{% if tools %}tools: {{ tools | tojson }}<end>{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def made_tokenizer():
    """Return a tokenizer of bytes, whose chat template writes tools and calls of tools."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def ready(data):
    """Return data that are tokenized."""
    return ready_with(data, made_tokenizer())


def save(folder, model):
    made_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder of a random Llama, with one token for each byte."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tiny_tokenizer()),
        eos_token_id=0,
        bos_token_id=None,
    )
    return save(tmp_path_factory.mktemp("base") / "llama", LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    """Folder of a random BART, with one token for each byte."""
    config = BartConfig(
        vocab_size=len(tiny_tokenizer()),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    return save(tmp_path_factory.mktemp("base") / "bart", BartForConditionalGeneration(config))


@pytest.fixture
def generate(cli, monkeypatch):  # noqa: F811
    """Run `generate --json`, and return (exit code, its prompts, their ids, stderr)."""
    seen = []

    def complete(self, input_ids, **_):
        seen.append(input_ids[0].tolist())
        return torch.nn.functional.pad(input_ids, (0, 1))

    monkeypatch.setattr(GenerationMixin, "generate", complete)

    def run(*options):
        seen.clear()
        code, out, err = cli("generate", *options, "--json")
        return code, [json.loads(line)["prompt"] for line in out.splitlines()], seen, err

    return run


def adapter_of(folder, base, data, conventions=None):
    """Return the folder of an adapter that records what data say of their prompts."""
    auto_class = BartForConditionalGeneration if isinstance(data, Seq2SeqData) else LlamaForCausalLM
    model = adapt(auto_class.from_pretrained(base), ["q_proj"], LoRA)
    record_conventions(model, data.conventions() if conventions is None else conventions)
    described = {"name": base, "auto_class": "AutoModelForCausalLM"}
    if isinstance(data, Seq2SeqData):
        described["auto_class"] = "AutoModelForSeq2SeqLM"
    return save_adapter(model, folder / "adapter", described)


def predicted(data):
    """Return the prompts of `predict`, and their ids."""
    examples = data.examples("predict")
    key = "source" if isinstance(data, Seq2SeqData) else "prompt"
    ids = [example["input_ids" if key == "source" else "prompt_ids"] for example in examples]
    return [example[key] for example in examples], [each.tolist() for each in ids]


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


NUMBERS = '{"price": 1.10, "flag": true, "options": {"text": ["a", "b"]}, "completion": " x"}'
HISTORY = {**ALPACA[0], "system": "Be exact.", "history": [["Hi", "Yo"]]}
DIALOG = {"dialog": OPENAI["messages"], "persona": None, "functions": json.dumps(OPENAI["tools"])}
CSV = 'prompt,completion\n1.10,x\ntrue,x\n"a\n\\nabla ""b""",x\n'
CASES = {
    "sharegpt": ("a.jsonl", lines(SHAREGPT, SHAREGPT), {}),
    "openai": ("a.jsonl", lines(OPENAI, OPENAI), {}),
    "openai-named": ("a.jsonl", lines(OPENAI, OPENAI), {"format": "openai"}),
    "a-list": ("a.json", json.dumps([SHAREGPT, SHAREGPT], indent=1), {}),
    "alpaca": ("a.jsonl", lines(*ALPACA), {}),
    "alpaca-chat": ("a.jsonl", lines(HISTORY, *ALPACA), {"chat": True}),
    "alpaca-template": ("a.jsonl", lines(*ALPACA), {
        "prompt": "{instruction}\n{input}\n", "completion": "{output}"}),
    "turns": ("a.jsonl", lines(TURNS, TURNS), {}),
    "prompts": ("a.jsonl", lines({"prompt": "a \\nabla", "completion": "x"}, NUMBERS[:-1]
                                 + ', "prompt": 1.10}'), {}),
    "prompts-chat": ("a.jsonl", lines({"prompt": "Hi\n", "completion": "x"}), {"chat": True}),
    "choices": ("a.jsonl", lines({"prompt": "Hi", "choices": ["a", "b"], "label": 1}), {}),
    "csv": ("a.csv", CSV, {}),
    "tsv": ("a.tsv", "prompt\tcompletion\n1.10\tx\n", {}),
    "numbers": ("a.jsonl", lines(NUMBERS), {"prompt": "{price} {flag} {options[text][1]}"}),
    "format": ("a.jsonl", lines(NUMBERS), {"prompt": "p {price:.3f} {price:>8}{{}}"}),
    "csv-format": ("a.csv", "price,completion\n1.1,x\n", {"prompt": "p {price:.3f} {price:>8}"}),
    "column": ("a.jsonl", lines({"q": "Hi", "prompt": "no", "completion": "x"}), {"prompt": "q"}),
    "null": ("a.jsonl", lines({"q": None, "completion": "x"}), {
        "prompt": "Q {q}:", "null_is_empty": True}),
    "dialog": ("a.jsonl", lines(DIALOG, DIALOG), {
        "messages": "dialog", "tools": "functions", "system": "persona"}),
    "system": ("a.jsonl", lines({"messages": OPENAI["messages"][1:], "persona": "Be kind."}), {
        "system": "persona"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_prompts_of_a_file_are_those_of_predict(case, llama, tmp_path, generate):
    name, text, keys = CASES[case]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    data = ready(CausalLMData(str(path), str(path), predict=str(path), **keys))
    adapter = adapter_of(tmp_path, llama, data)
    code, prompts, ids, err = generate(adapter, "--file", path)
    assert code == 0, err
    assert (prompts, ids) == predicted(data)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"article": "Red", "source": "no", "target": "x"}, {"source": "article", "prefix": "{"}),
        ({"t": {"en": "Red", "de": "Rot"}}, {"source": "{t[en]}", "target": "{t[de]}"}),
        ({"source": "Red", "target": "x"}, {}),
        ({"a:b": "Red", "target": "x"}, {"source": "a:b"}),
        ({"a.b": "Red", "target": "x"}, {"source": "a.b", "prefix": "to: "}),
    ],
    ids=["column", "template", "plain", "colon", "dot"],
)  # fmt: skip
def test_the_sources_of_a_file_are_those_of_predict(row, keys, bart, tmp_path, generate):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(row, row))
    data = ready(Seq2SeqData(str(path), str(path), predict=str(path), **keys))
    adapter = adapter_of(tmp_path, bart, data)
    code, prompts, ids, err = generate(adapter, "--file", path)
    assert code == 0, err
    assert (prompts, ids) == predicted(data)


def test_parquet_and_compressed_files_are_read(llama, tmp_path, generate):
    rows = [{"prompt": "Hi", "completion": "x"}] * 2
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*rows).encode()))
    for name in ("a.parquet", "a.jsonl.gz"):
        code, prompts, _, err = generate(llama, "--file", tmp_path / name)
        assert (code, prompts) == (0, ["Hi", "Hi"]), err


def test_adapters_of_earlier_versions_record_the_template_alone(llama, tmp_path, generate):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*ALPACA))
    data = ready(CausalLMData(str(path), str(path), predict=str(path)))
    recorded = {"chat": False, "prompt": data.prompt_template}
    adapter = adapter_of(tmp_path, llama, data, recorded)
    assert generate(adapter, "--file", path)[1] == predicted(data)[0]
    recorded = {"chat": False, "prompt": "p {price:.2f}"}
    adapter = adapter_of(tmp_path, llama, data, recorded)
    path.write_text(lines(NUMBERS))
    assert generate(adapter, "--file", path)[1] == ["p 1.10"]


def test_a_merged_model_reads_files_as_its_adapter_did(llama, tmp_path, generate):
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"q": "Hi", "prompt": "no", "completion": "x"}))
    data = ready(CausalLMData(str(path), str(path), predict=str(path), prompt="q"))
    adapter = adapter_of(tmp_path, llama, data)
    main(["merge", str(adapter), "--out", str(tmp_path / "merged")])
    assert generate(tmp_path / "merged", "--file", path)[1] == ["Hi"]


def test_texts_in_the_column_prompt_are_put_into_the_template(llama, tmp_path, generate):
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"q": "Hi", "completion": "x"}))
    data = ready(CausalLMData(str(path), str(path), prompt="Q {q}:"))
    adapter = adapter_of(tmp_path, llama, data)
    path.write_text(lines({"prompt": "a \\nabla"}, {"prompt": "Q whole:"}))
    assert generate(adapter, "--file", path)[1] == ["Q a \\nabla:", "Q whole:"]
    assert generate(adapter, "--file", path, "--raw")[1] == ["a \\nabla", "Q whole:"]


def test_a_backslash_n_is_a_line_break_where_a_person_types(llama, tmp_path, generate, monkeypatch):
    assert generate(llama, "--prompt", "a\\nb")[1] == ["a\nb"]
    (tmp_path / "a.txt").write_text("a\\nb\n")
    assert generate(llama, "--file", tmp_path / "a.txt")[1] == ["a\nb"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\\nb\n"))
    assert generate(llama)[1] == ["a\nb"]
    data = ready(CausalLMData(*[str(tmp_path / "a.txt")] * 2))
    adapter = adapter_of(tmp_path, llama, data, {"prompt": "{a:.2f} {b}"})
    columns = '{"a": 1.101, "b": "\\\\nabla"}'
    assert generate(adapter, "--prompt", columns)[1] == ["1.10 \\nabla"]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (lines({"prompt": "a"}, {"prompt": None}), (), r"Row 1 of .* has no 'prompt' \(it is null"),
        (lines({"prompt": "a"}, {"prompt": ""}), (), "row 1 of .*: An empty prompt"),
        (lines({"prompt": "a"}, {"prompt": ["x"]}), (), "Row 1 of .*prompt: a list is no text"),
        (lines(OPENAI, OPENAI), ("--no-chat",), "row 0 of .* is a conversation.*--no-chat"),
        (lines(TURNS, TURNS), ("--raw",), "row 0 of .* is a conversation.*--raw"),
        (lines(*ALPACA), ("--raw",), "no column 'prompt' to take as it is"),
        (lines({"promt": "a"}), (), r"columns \['promt'\], and no prompts. It needs a column of"),
        (lines({"messages": [{"role": "user", "content": None}]}), (), "turn 0 .* is null"),
        ("", (), "has no rows"),
        ("{\n", (), "line 1, cannot be read as json"),
    ],
    ids=["null", "empty", "list", "no-chat", "raw", "raw-alpaca", "unknown", "turn", "none",
         "broken"],
)  # fmt: skip
def test_rows_without_a_prompt_are_refused(text, options, said, llama, tmp_path, generate):
    (tmp_path / "a.jsonl").write_text(text)
    code, prompts, ids, err = generate(llama, "--file", tmp_path / "a.jsonl", *options)
    assert code == 2
    assert (prompts, ids) == ([], []), "a file is refused as a whole"
    assert re.search(said, err), err
    assert len(err.strip().splitlines()) == 1
    assert "null_is_empty" not in err, "generate has no such key"


def test_a_file_that_fits_several_sources_is_refused(llama, tmp_path, generate):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*[{"q": "Hi", "a": "Yo", "completion": "x"}] * 2))
    sources = [{"path": str(path), "prompt": template} for template in ("Q {q}", "A {a}")]
    data = ready(CausalLMData([Source(**source) for source in sources], str(path), prompt="{q}"))
    adapter = adapter_of(tmp_path, llama, data)
    code, _, _, err = generate(adapter, "--file", path)
    assert code == 2
    assert "fits several sources of training" in err
    path.write_text(lines({"a": "Yo"}))
    assert generate(adapter, "--file", path)[1] == ["A Yo"]
