"""Files of other libraries' users: recognized by columns, read exactly, or refused by name."""

import json
import logging
import re

import pytest
import torch
from datasets import Dataset
from test_data_text import cache, problem, ready, tiny_tokenizer, trained, write

from adaptrank.data import CausalLMData, Source
from adaptrank.data.documents import blocks
from adaptrank.data.instructions import PROMPT

__all__ = ["cache"]  # a fixture

TOOL = {
    "type": "function",
    "function": {
        "name": "convert",
        "description": "Convert an amount.",
        "parameters": {"type": "object", "properties": {"amount": {"type": "number"}}},
    },
}
ARGUMENTS = {"amount": 3, "to": "Zürich"}

SHAREGPT = {
    "id": "identity_0",
    "conversations": [
        {"from": "human", "value": "  How much is 007 in francs?\n"},
        {"from": "function_call", "value": json.dumps({"name": "convert", "arguments": ARGUMENTS})},
        {"from": "observation", "value": '{"result": 2.50}'},
        {"from": "gpt", "value": "It is 2.50."},
    ],
    "system": "Be exact.",
    "tools": json.dumps([TOOL["function"]]),
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "How much is 007 in francs?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "convert", "arguments": json.dumps(ARGUMENTS)},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"result": 2.50}'},
        {"role": "assistant", "content": "It is 2.50.", "weight": 1},
    ],
    "tools": [TOOL],
    "parallel_tool_calls": False,
}
ALPACA = [
    {"instruction": "Add the numbers.", "input": "1.10 and 2", "output": "3.10"},
    {"instruction": "Name a {colour}.", "input": "", "output": "Red"},
]
TURNS = {
    "prompt": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
    ],
    "completion": [{"role": "assistant", "content": "Ciao"}],
}


def write_as(kind, path, rows):
    """Write rows as JSON Lines, as one JSON list, or as Parquet."""
    if kind == "jsonl":
        return write(path.with_suffix(".jsonl"), rows)
    path = path.with_suffix(f".{kind}")
    if kind == "json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def rows_of(path, split="train", **keys):
    return CausalLMData(path, path, **keys).rows(split)


def texts(tmp_path, row, **keys):
    """The text that is trained on, and all of the text."""
    path = write(tmp_path / "a.jsonl", [row] * 2)
    data = ready(CausalLMData(path, path, **keys), stage="fit")
    example = data.examples("train")[0]
    return trained(data, example), data.tokenizer.decode(example["input_ids"])


# ---- each format


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", ["auto", "sharegpt"])
def test_sharegpt(kind, name, tmp_path):
    path = write_as(kind, tmp_path / "chats", [SHAREGPT] * 2)
    [row, _] = rows_of(path, format=name)
    call = {"type": "function", "function": {"name": "convert", "arguments": ARGUMENTS}}
    assert row == {
        "messages": [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": "  How much is 007 in francs?\n"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": '{"result": 2.50}'},
            {"role": "assistant", "content": "It is 2.50."},
        ],
        "tools": [TOOL["function"]],
    }


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", ["auto", "openai"])
def test_openai(kind, name, tmp_path):
    path = write_as(kind, tmp_path / "chats", [OPENAI] * 2)
    [row, _] = rows_of(path, format=name)
    system, user, calling, tool, reply = row["messages"]
    assert (system, user) == tuple(OPENAI["messages"][:2])
    assert calling == {**OPENAI["messages"][2], "content": ""}
    assert tool == OPENAI["messages"][3]
    assert reply == {"role": "assistant", "content": "It is 2.50."}
    assert row["tools"] == [TOOL]


def test_parquet_fills_no_nulls_into_calls_and_tools(tmp_path):
    other = json.loads(json.dumps(OPENAI))
    other["tools"][0]["function"]["parameters"]["properties"] = {"place": {"type": "string"}}
    other["messages"][2]["tool_calls"][0]["function"]["strict"] = True
    path = write_as("parquet", tmp_path / "chats", [OPENAI, other])
    rows = rows_of(path)
    assert [row["tools"] for row in rows] == [OPENAI["tools"], other["tools"]]
    assert "null" not in json.dumps(rows)
    assert "None" not in repr(rows)


def test_the_names_of_before_functions_were_tools(tmp_path):
    turns = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "done"},
        {"role": "assistant", "content": "Done."},
    ]
    [row, _] = rows_of(write(tmp_path / "a.jsonl", [{"messages": turns}] * 2))
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert row["messages"][1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "done"},
    ]


def test_turns_are_told_by_their_keys(tmp_path):
    chatml = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    want = [{"messages": chatml}] * 2
    for k, row in enumerate(
        [{"conversations": chatml}, {"conversation": shared}, {"messages": shared},
         {"messages": json.dumps(chatml)}]
    ):  # fmt: skip
        assert rows_of(write(tmp_path / f"{k}.jsonl", [row] * 2)) == want
    path = write(tmp_path / "named.jsonl", [{"dialog": shared}] * 2)
    assert rows_of(path, messages="dialog") == want
    assert rows_of(path, messages="dialog", format="sharegpt") == want
    assert "has a key 'from', and the format is openai. Set format: sharegpt" in problem(
        CausalLMData(path, path, messages="dialog", format="openai")
    )


@pytest.mark.parametrize("name", ["auto", "alpaca"])
def test_alpaca_without_a_chat_template(name, tmp_path):
    path = write_as("json", tmp_path / "alpaca", ALPACA)
    data = CausalLMData(path, path, format=name)
    first, second = data.rows("train")
    assert first["prompt"] == (
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1.10 and 2\n\n### Response:\n"
    )
    assert second == {
        "prompt": "### Instruction:\nName a {colour}.\n\n### Response:\n",
        "completion": "Red",
    }
    assert data.prompt_template == PROMPT
    assert trained(ready(data), data.examples("train")[1]) == "Red<end>"
    assert data.conventions()["prompt"] == PROMPT


def test_alpaca_as_conversations(tmp_path):
    row = {
        **ALPACA[0],
        "system": "Be short.",
        "history": [["Hi", "Yo"], ["How?", " So. "]],
        "text": "all of it",
    }
    said, _ = texts(tmp_path, row, chat=True)
    assert said == "Yo<end> So. <end>3.10<end>"
    [row, _] = rows_of(str(tmp_path / "a.jsonl"), chat=True)
    assert row["messages"][0] == {"role": "system", "content": "Be short."}
    assert row["messages"][-2]["content"] == "Add the numbers.\n1.10 and 2"
    assert "Row 0" in problem(CausalLMData(str(tmp_path / "a.jsonl")))
    assert "Set `chat: true`" in problem(CausalLMData(str(tmp_path / "a.jsonl")))


def test_prompts_and_completions_as_turns(tmp_path):
    _, whole = texts(tmp_path, TURNS)
    assert whole.startswith("<s>user\nHi<end>\n<s>assistant\nYo<end>\n")
    [row, _] = rows_of(str(tmp_path / "a.jsonl"))
    assert row["messages"][1] == {"role": "assistant", "content": "Yo", "weight": 0}
    assert [turn["content"] for turn in row["messages"]] == ["Hi", "Yo", "Bye", "Ciao"]
    path = write(tmp_path / "ask.jsonl", [{"prompt": TURNS["prompt"]}] * 2)
    [row, _] = rows_of(path, "predict", predict=path)
    assert len(row["messages"]) == 3
    mixed = write(tmp_path / "mixed.jsonl", [{**TURNS, "completion": "Ciao"}] * 2)
    assert "completion: messages is no list of turns" in problem(CausalLMData(mixed, mixed))


def test_plain_text_trains_on_every_token_once(tmp_path):
    said, whole = texts(tmp_path, {"text": "0.10 \u00e9 and more\n"}, max_length=64)
    assert whole == "0.10 \u00e9 and more\n<end>"
    assert said == whole[1:]
    path = str(tmp_path / "a.jsonl")
    data = ready(CausalLMData(path, path, max_length=8, batch_size=2), stage="fit")
    pieces = data.examples("train")
    assert max(len(piece["input_ids"]) for piece in pieces) == 8
    joined = torch.cat([piece["labels"] for piece in pieces])
    once = data.tokenizer.decode(joined[joined != -100])
    assert once == said * 2
    lines = tmp_path / "poem.txt"
    lines.write_text("one\n\ntwo\n")
    assert rows_of(str(lines)) == [{"text": "one"}, {"text": "two"}]
    rows = rows_of(
        write(tmp_path / "b.jsonl", [{"title": "T", "body": "B"}] * 2), text="{title}: {body}"
    )
    assert rows == [{"text": "T: B"}] * 2


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 15, 16])
def test_blocks_predict_each_token_but_the_first_once(length):
    ids = list(range(length))
    parts = list(blocks(ids, 8))
    assert [label for _, labels in parts for label in labels if label != -100] == ids[1:]
    assert all(2 <= len(block) <= 8 and labels[0] == -100 for block, labels in parts)
    # The token before each label is the one before it in the document.
    for block, labels in parts:
        assert all(labels[k] == block[k] == block[k - 1] + 1 for k in range(1, len(block)))


def test_plain_text_has_nothing_to_predict(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "words"}] * 3)
    with pytest.raises(ValueError, match="no prompt to complete"):
        ready(CausalLMData(path, path)).predict_dataloader()
    assert "no prompt to complete" in problem(
        CausalLMData(path, path, predict=path, format="text"), stage="predict"
    )
    assert "fits no format by its columns ['text']" in problem(
        CausalLMData(path, path, predict=path), stage="predict"
    )
    scored = write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c", "answer": "c"}] * 3)
    data = CausalLMData([Source(path), Source(scored)])
    assert "The val rows mix plain text with prompts" in problem(data)
    plain = CausalLMData([Source(path), Source(scored)], validation=path)
    assert len(ready(plain, stage="fit").examples("train")) == 6


# ---- flags of turns


@pytest.mark.parametrize(
    ("flag", "off", "on"), [("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True)]
)
def test_a_turn_of_weight_zero_is_context(flag, off, on, tmp_path):
    # As in SlimOrca, every turn may have the key, null where it means nothing.
    turns = [
        {"from": "system", "value": "S", flag: None},
        {"from": "human", "value": "Hi", flag: off},
        {"from": "gpt", "value": "Yo", flag: off},
        {"from": "human", "value": "Bye", flag: off},
        {"from": "gpt", "value": "Ciao", flag: on},
    ]
    [row, _] = rows_of(write(tmp_path / "a.jsonl", [{"conversations": turns}] * 2))
    assert [turn.get("weight") for turn in row["messages"]] == [None, None, 0, None, None]
    assert not any("train" in turn for turn in row["messages"])


def conversation(*turns):
    return {"messages": [dict(zip(("role", "content"), turn, strict=False)) for turn in turns]}


def with_keys(row, k, **keys):
    row["messages"][k] |= keys
    return row


PAIR = (("user", "Hi"), ("assistant", "Yo"))
REFUSED = {
    "turn 1 has weight=0.5. Use 1 or true": with_keys(conversation(*PAIR), 1, weight=0.5),
    "turn 1 has train='no'. Use 1 or true": with_keys(conversation(*PAIR), 1, train="no"),
    "turn 1 has weight and train that disagree": with_keys(
        conversation(*PAIR), 1, weight=0, train=True
    ),
    "turn 0 is trained on by its weight, and its role is 'user'": with_keys(
        conversation(*PAIR), 0, weight=1
    ),
    "turn 1 has a train_detail, which chooses parts": with_keys(
        conversation(*PAIR), 1, train_detail=[{"begin_offset": 0, "end_offset": 1, "train": True}]
    ),
    "no assistant turn to train on, because every one is left out": with_keys(
        conversation(*PAIR), 1, weight=0
    ),
    "no assistant turn to train on (its roles are ['gpt', 'human'])": conversation(
        ("human", "Hi"), ("gpt", "Yo")
    ),
    "messages is no list of turns": {"messages": []},
    "turn 0 of messages has no role. Its keys are ['input', 'output']": {
        "messages": [{"input": "Hi", "output": "Yo"}]
    },
    "the content of turn 0 of messages has a part of type 'image_url'": conversation(
        ("user", [{"type": "image_url", "image_url": {"url": "x"}}]), PAIR[1]
    ),
    "the content of turn 0 of messages: an object is no text": conversation(
        ("user", {"a": 1}), PAIR[1]
    ),
    "turn 0 is from 'humn', which is unknown. Use one of system, human": {
        "conversations": [{"from": "humn", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    },
    "turn 0: the call of a tool is 'convert it', which is no JSON": {
        "conversations": [{"from": "function_call", "value": "convert it"}]
    },
    "turn 0 calls a tool by {'arguments': {}}, which has no name": {
        "conversations": [{"from": "function_call", "value": '{"arguments": {}}'}]
    },
    "the number 1.10 in the arguments of a tool would be written as 1.1": with_keys(
        conversation(*PAIR), 1, tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1.10}'}}]
    ),
    "tools is 'none', which is no JSON": {**conversation(*PAIR), "tools": "none"},
    "tools is {}, and not a list of functions": {**conversation(*PAIR), "tools": {}},
    "has two system messages": {
        "conversations": [
            {"from": "system", "value": "A"}, {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Yo"},
        ],
        "system": "B",
    },
    "history is [['Hi']], and not a list of pairs": {**ALPACA[0], "history": [["Hi"]]},
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_honoured_is_refused_by_name(says, tmp_path):
    path = write(tmp_path / "a.jsonl", [REFUSED[says]] * 2)
    said = problem(CausalLMData(path, path, chat=True))
    assert says in said
    assert "Row 0 of" in said


def test_what_is_not_trained_on_is_told(tmp_path, caplog):
    rows = [
        conversation(*PAIR, ("user", "Bye")),
        conversation(("ipython", "x"), ("user", ""), ("assistant", "Yo")),
    ]
    [first, _] = rows_of(write(tmp_path / "a.jsonl", rows))
    assert len(first["messages"]) == 3
    said = caplog.text
    assert "1 of 2 conversations" in said
    assert "end with a turn that no reply follows" in said
    assert re.search("1 turns of .* are empty", said)
    assert "have the role 'ipython'" in said


def test_parts_of_a_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "1.10 "}, {"type": "text", "text": "\u00e9"}]
    said, _ = texts(tmp_path, conversation(("user", "Hi"), ("assistant", parts)))
    assert said == "1.10 \u00e9<end>"


# ---- which format it is


def test_columns_that_fit_no_format_are_listed_with_the_formats(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "reply": "r"}] * 3)
    said = problem(CausalLMData(path))
    assert "fits no format by its columns ['question', 'reply']" in said
    for part in ("sharegpt (conversations)", "openai (messages)", "alpaca (instruction, output)",
                 "prompt_completion (prompt, completion)", "text (text)"):  # fmt: skip
        assert part in said
    path = write(tmp_path / "b.jsonl", [{"conversatons": []}] * 3)
    assert "Did you mean 'conversations' by 'conversatons'?" in problem(CausalLMData(path))


def test_two_formats_are_refused_or_have_an_order(tmp_path, caplog):
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    both = write(tmp_path / "both.jsonl", [{"conversations": shared, **ALPACA[0]}] * 2)
    assert "fits two formats, sharegpt and alpaca" in problem(CausalLMData(both, both))
    assert "messages" in rows_of(both, format="sharegpt")[0]
    assert rows_of(both, format="alpaca")[0]["completion"] == "3.10"
    row = {"messages": conversation(*PAIR)["messages"], "prompt": "p", "completion": "c"}
    path = write(tmp_path / "older.jsonl", [row] * 2)
    caplog.set_level(logging.WARNING)
    assert "messages" in rows_of(path)[0]
    assert "It has the columns of the format prompt_completion, too" in caplog.text
    assert rows_of(path, format="prompt_completion") == [{"prompt": "p", "completion": "c"}] * 2
    # Alpaca's own file has the whole text beside its columns.
    path = write(tmp_path / "alpaca.jsonl", [{**ALPACA[1], "text": "all"}] * 2)
    assert rows_of(path)[0]["completion"] == "Red"
    assert rows_of(path, format="text") == [{"text": "all"}] * 2


def test_a_format_is_checked_before_and_against_the_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}] * 2)
    with pytest.raises(ValueError, match=r"format='sharegtp' is unknown.*Did you mean 'sharegpt'"):
        CausalLMData(path, format="sharegtp")
    with pytest.raises(ValueError, match="format='chatml' is unknown"):
        CausalLMData([Source(path, format="chatml")])
    for name, column in (("sharegpt", "conversations"), ("openai", "messages"),
                         ("alpaca", "instruction"), ("text", "text")):  # fmt: skip
        said = problem(CausalLMData(path, path, format=name))
        assert f"format {name} needs a column {column!r}" in said
        assert "only ['prompt', 'completion']" in said
    assert "format alpaca has no field 'prompt'" in problem(
        CausalLMData(path, path, format="alpaca", prompt="{prompt}")
    )
    assert "has templates for 'prompt' and 'text'" in problem(
        CausalLMData(path, path, text="{prompt}", prompt="{prompt}")
    )
    pairs = [{"conversations": [], "chosen": {}, "rejected": {}}] * 2
    assert "has a column 'chosen'" in problem(CausalLMData(write(tmp_path / "b.jsonl", pairs)))


def test_sources_of_several_formats_are_mixed(tmp_path):
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    sources = [
        Source(write(tmp_path / "a.jsonl", [{"conversations": shared}] * 2)),
        Source(write_as("json", tmp_path / "b", ALPACA)),
        Source(write(tmp_path / "c.jsonl", [{"text": "words"}] * 2)),
    ]
    data = ready(CausalLMData(sources, validation=sources[:1]), stage="fit")
    said = [trained(data, example) for example in data.examples("train")]
    assert said == ["Yo<end>"] * 2 + ["3.10<end>", "Red<end>"] + ["ords<end>"] * 2
    assert data.prompt_template is None
    assert "chat" not in data.conventions()


def test_an_adapter_of_plain_text_completes_raw_prompts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "words"}] * 2)
    data = ready(CausalLMData(path, path), tiny_tokenizer(bos=True), stage="fit")
    assert data.conventions() == {
        "chat": False, "stop_tokens": {"<end>": 0}, "pad_token": {"<end>": 0}
    }  # fmt: skip
    assert data.tokenizer.decode(data.examples("train")[0]["input_ids"]) == "<s>words<end>"
