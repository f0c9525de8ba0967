"""Conversations by every chat template that TRL brings, and what is trained on of them."""

import importlib.util
import logging
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptrank._errors import UserError
from adaptrank.data import CausalLMData, CompletionTask
from adaptrank.data.chat_template import ChatTemplate, training_template
from adaptrank.data.template_names import shipped_templates

has_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the templates are those of TRL"
)

ENDS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|eot|>",
    "<|eom|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<turn|>",
    "<|END_RESPONSE|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
]
"""Tokens that end a turn of the assistant in some template."""

STARTS = [
    "<bos>",
    "<|im_start|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<start_of_turn>",
    "<|turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|START_OF_TURN_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|START_RESPONSE|>",
]
"""Other special tokens of templates."""

TEXTS = {
    "user": ["What is two plus two?", "And three plus three?", "Thank you so much."],
    "assistant": ["It is four, of course.", "That would be six.", "You are welcome."],
}

AROUND_CONTENT = re.compile(
    r"(?:\s|</?think>|<\|channel\|>final<\|message\|>|to=user<\|message\|>"
    r"|<\|channel>thought|<channel\|>)*"
)
"""What a template lets a model generate around the content of a reply without reasoning."""

OPENS_REASONING = ("deepseek", "nemotron")
"""Templates whose generation prompt opens a reasoning that a reply without one does not have."""


def byte_tokenizer(template=None, special=(*STARTS, *ENDS)):
    """One token for each byte, and some special tokens."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", chat_template=template
    )


TOKENIZERS = {}


def tokenizer_with(template, special=(*STARTS, *ENDS)):
    """The byte tokenizer with a template, built once."""
    if special not in TOKENIZERS:
        TOKENIZERS[special] = byte_tokenizer(special=special)
    TOKENIZERS[special].chat_template = template
    return TOKENIZERS[special]


def turns(count=3, system=None):
    """A conversation of some questions with their answers."""
    messages = [{"role": "system", "content": system}] if system else []
    for k in range(count):
        messages += [{"role": role, "content": TEXTS[role][k]} for role in ("user", "assistant")]
    return messages


def data_with(template, special=(*STARTS, *ENDS), max_length=20000, **arguments):
    data = CausalLMData("unused.csv", max_length=max_length, **arguments)
    data.tokenizer = tokenizer_with(template, special)
    return data


def trained_runs(data, example):
    """Return the texts that an example trains on, and the text before the last of them."""
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    assert [label for label in labels if label != -100] == [
        number for number, label in zip(ids, labels, strict=True) if label != -100
    ]
    runs, start = [], None
    for k, label in enumerate([*labels, -100]):
        if label != -100 and start is None:
            start = k
        elif label == -100 and start is not None:
            runs.append((start, k))
            start = None
    texts = [data.tokenizer.decode(ids[first:last]) for first, last in runs]
    return texts, ids[: runs[-1][0]]


def encoded(data, messages, split="train", **row):
    return data.encode([{"messages": messages, **row}], split)


def text_of(data, example):
    return data.tokenizer.decode(example["input_ids"])


def check_replies(data, messages, ends):
    """Hold what is trained on against the contents of the assistant's turns.

    Returns:
        The examples.
    """
    examples = encoded(data, messages)
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    others = [message["content"] for message in messages if message["role"] != "assistant"]
    runs = [text for example in examples for text in trained_runs(data, example)[0]]
    assert len(runs) == len(replies)
    for reply, run in zip(replies, runs, strict=True):
        before, found, after = run.partition(reply)
        assert found == reply
        assert AROUND_CONTENT.fullmatch(before), before
        assert after in ends or not ends, after
        assert not any(other in run for other in others)
    assert not ends or runs[-1].endswith((*ENDS, "<|user|>"))
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        untrained = data.tokenizer.decode(ids[labels == -100])
        supervised = data.tokenizer.decode(labels[labels != -100])
        assert not any(reply in untrained for reply in replies if reply in supervised)
        assert text_of(data, example).count("<bos>") <= 1
    return examples


def check_prompt(data, messages, examples):
    """Hold the prompt of generation against what stands before the last reply in training."""
    [asked] = encoded(data, messages[:-1], "predict")
    before = trained_runs(data, examples[-1])[1]
    assert asked["prompt_ids"].tolist() == before


def takes_a_system_prompt(name):
    return not re.fullmatch(r"gemma(_training)?", name)


# ---- all templates


@has_trl
@pytest.mark.parametrize("name", sorted(shipped_templates()))
def test_every_template_trains_on_the_replies_and_their_ends_only(name):
    template = shipped_templates()[name].read_text(encoding="utf-8")
    system = "Answer in one sentence." if takes_a_system_prompt(name) else None
    messages = turns(3, system)
    data = data_with(template)
    # GLM ends a turn by the role of the next one.
    ends = [*ENDS, "<|user|>", ""] if name.startswith("glm4moe") else ENDS
    examples = check_replies(data, messages, ends)
    assert data.conventions()["chat_template"]
    if not name.startswith(OPENS_REASONING):
        check_prompt(data, messages, examples)
    if system:
        assert all(system in text_of(data, example) for example in examples)
    # Where the marks are no tokens of the tokenizer, its end token stands after the last reply.
    plain = data_with(template, special=("<bos>", "<eos>"))
    check_replies(plain, messages, ())


def text_of_template(name):
    return shipped_templates()[name].read_text(encoding="utf-8")


# ---- which way a template goes

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML."""

FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that writes the last reply in another way than the others."""

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that marks replies, without their closing token."""


def test_one_example_holds_all_replies_where_turns_do_not_change():
    data = data_with(PLAIN)
    [example] = check_replies(data, turns(3, "Be kind."), ENDS)
    assert trained_runs(data, example)[0] == [f"{text}<|im_end|>" for text in TEXTS["assistant"]]
    assert data.conventions()["stop_tokens"].keys() == {"<|im_end|>"}


def test_a_marked_template_trains_on_its_marks_and_on_the_closing_token():
    data = data_with(MARKED)
    [example] = check_replies(data, turns(), ENDS)
    assert trained_runs(data, example)[0] == [f"{text}<|im_end|>" for text in TEXTS["assistant"]]


def test_marks_leave_out_a_part_of_a_reply():
    template = MARKED.replace(
        "{% generation %}", "{% if 'four' in m.content %}(sum) {% endif %}{% generation %}"
    )
    data = data_with(template)
    [example] = encoded(data, turns(1))
    assert trained_runs(data, example)[0] == ["It is four, of course.<|im_end|>"]
    assert "assistant\n(sum) It is four" in text_of(data, example)


def test_marks_around_nothing_are_refused():
    template = MARKED.replace(
        "{{ m.content }}{% endgeneration %}", "{% endgeneration %}{{ m.content }}"
    )
    with pytest.raises(UserError, match=r"marks nothing of a reply.*`chat_template`"):
        encoded(data_with(template), turns())


def test_a_turn_that_changes_gives_one_example_for_each_reply(caplog):
    data = data_with(FORGETFUL)
    messages = turns(3)
    with caplog.at_level(logging.WARNING, "adaptrank"):
        examples = check_replies(data, messages, ENDS)
    assert len(examples) == 3
    assert "1 of 1 conversations became one example for each reply, 3 in all" in caplog.text
    for k, example in enumerate(examples):
        # Each example is what the model is given when it has to write this reply.
        check_prompt(data, messages[: 2 * k + 2], [example])
        asked = data.tokenizer.apply_chat_template(
            messages[: 2 * k + 1], tokenize=False, add_generation_prompt=True
        )
        assert text_of(data, example).startswith(asked)
    assert data.conventions()["chat_template"] == FORGETFUL


def test_a_scored_conversation_keeps_its_last_reply_only():
    data = data_with(FORGETFUL)
    rows = [{"messages": turns(2), "answer": "six"}, {"messages": turns(3), "answer": "welcome"}]
    examples = data.encode(rows, "val")
    assert [example["answer"] for example in examples] == ["six", "welcome"]
    for example in examples:
        [_], before = trained_runs(data, example)
        assert example["prompt_ids"].tolist() == before
    assert len(data.encode([{"messages": turns(2)}], "val")) == 2


@has_trl
def test_the_training_template_of_trl_is_named_recorded_and_can_be_overridden(caplog):
    own = text_of_template("qwen3")
    data = data_with(own)
    with caplog.at_level(logging.WARNING, "adaptrank"):
        [example] = encoded(data, turns(3))
    assert "TRL's training template for it, qwen3_training" in caplog.text
    assert data.conventions()["chat_template"] == text_of_template("qwen3_training")
    assert len(trained_runs(data, example)[0]) == 3
    assert data.tokenizer.chat_template == own, "the tokenizer may serve others"
    given = data_with(own, chat_template="qwen3")
    assert len(encoded(given, turns(3))) == 3
    assert given.conventions()["chat_template"] == own
    single = data_with(own)
    encoded(single, turns(1))
    assert single.conventions()["chat_template"] == own, "one turn needs no other template"


def test_without_trl_a_turn_that_changes_still_trains(monkeypatch):
    monkeypatch.setattr("adaptrank.data.chat_format.training_template", lambda template: None)
    for name in ("qwen3", "deepseek_r1_distill", "gptoss", "phi3"):
        if name in shipped_templates():
            check_replies(data_with(text_of_template(name)), turns(3), ENDS)


def test_weights_choose_replies():
    messages = turns(3)
    messages[1]["weight"] = 0
    for template in (PLAIN, FORGETFUL, MARKED):
        data = data_with(template)
        runs = [t for one in encoded(data, messages) for t in trained_runs(data, one)[0]]
        assert len(runs) == 2
        assert "four" not in "".join(runs)
    for message in messages:
        message["weight"] = 0
    with pytest.raises(UserError, match="no assistant turn to train on"):
        encoded(data_with(PLAIN), messages)


# ---- reasoning, tools, parts


def reasoned():
    messages = turns(2)
    messages[1]["content"] = "<think>\nTwo and two.\n</think>\n\nIt is four."
    messages[3]["content"] = "<think>\nThree and three.\n</think>\n\nIt is six."
    return messages


@has_trl
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "lfm2_2_5"])
def test_reasoning_is_trained_on_in_every_turn(name):
    data = data_with(text_of_template(name))
    messages = reasoned()
    examples = encoded(data, messages)
    trained = "".join(text for one in examples for text in trained_runs(data, one)[0])
    assert trained.count("Two and two.") == trained.count("Three and three.") == 1
    check_prompt(data, messages, examples)


def test_a_template_that_drops_reasoning_is_refused():
    template = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(UserError, match=r"leaves out a part of a reply, 'Two and two\.'"):
        encoded(data_with(template), reasoned())


def test_what_a_template_does_not_read_is_said(caplog):
    messages = turns(2, "Be kind.")
    messages[2]["reasoning_content"] = "Two and two."
    messages.insert(2, {"role": "tool", "content": "4"})
    template = PLAIN.replace("messages %}", "messages if m.role in ('user', 'assistant') %}")
    with caplog.at_level(logging.WARNING, "adaptrank"):
        encoded(data_with(template), messages, tools=[{"name": "add"}])
    assert "leaves out turns of the role 'system' and turns of the role 'tool' and the tools" in (
        caplog.text
    )
    assert "leaves out the reasoning of 1 of 1 conversations" in caplog.text


def called(arguments):
    function = {"name": "add_up", "arguments": arguments}
    return [
        {"role": "user", "content": "What is two plus two?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": function}],
        },
        {"role": "tool", "name": "add_up", "content": "4"},
        {"role": "assistant", "content": "It is four."},
    ]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add_up",
            "description": "Add.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]


@has_trl
@pytest.mark.parametrize(
    "name",
    ["qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "gptoss", "deepseekv3", "gemma4_v5",
     "glm4moe", "lfm2_2_5_v2", "muse_glimmer", "nemotron_3_nano"],
)  # fmt: skip
def test_calls_of_tools_are_trained_on_and_results_are_not(name):
    data = data_with(text_of_template(name))
    runs = {}
    for arguments in ({"a": 23}, '{"a": 23}'):
        examples = encoded(data, called(arguments), tools=TOOLS)
        several = [text for one in examples for text in trained_runs(data, one)[0]]
        assert len(several) == 2
        assert "add_up" in several[0]
        assert "23" in several[0]
        assert "It is four." in several[1]
        assert "add_up" in text_of(data, examples[0])
        runs[str(arguments)] = several
    first, second = runs.values()
    assert first == second, "arguments are an object or its text"


MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
"""A token, or a text that is read as one."""

CALLS_WITHOUT_CONTENT = ("llama3_", "muse_glimmer")
"""Beginnings of the names of templates that write a call, and not the content beside it."""


def check_first_run(data, messages, example):
    """Hold where the first trained text of an example begins and ends.

    Nothing but a beginning of the generation prompt stands before it, and no mark is cut in two.
    """
    labels = example["labels"].tolist()
    start = next(k for k, label in enumerate(labels) if label != -100)
    end = next((k for k in range(start, len(labels)) if labels[k] == -100), len(labels))
    ids = example["input_ids"].tolist()
    before, run, after = map(data.tokenizer.decode, (ids[:start], ids[start:end], ids[end:]))
    asked = data.tokenizer.apply_chat_template(
        messages[:1], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert asked.startswith(before)
    for mark in MARK.finditer(before + run + after):
        for cut in (len(before), len(before + run)):
            assert not mark.start() < cut < mark.end(), (mark[0], run)
    return run


def names_of_templates():
    """Yield all names. Training templates write calls as those that they stand for."""
    for name in sorted(shipped_templates()):
        is_training = name.endswith("_training")
        yield pytest.param(name, marks=[pytest.mark.tables] if is_training else [])


@has_trl
@pytest.mark.parametrize("content", [None, "Let me add 23."], ids=["call", "content and call"])
@pytest.mark.parametrize("name", names_of_templates())
def test_a_reply_that_calls_a_tool_begins_where_the_model_begins(name, content):
    data = data_with(text_of_template(name))
    messages = called({"a": 23})
    messages[1]["content"] = content
    knows_calls = "tool_calls" in text_of_template(name) and "deepseek_r1" not in name
    if not knows_calls or (content and name.startswith(CALLS_WITHOUT_CONTENT)):
        with pytest.raises(UserError, match="leaves out a part of a reply"):
            encoded(data, messages[:2], tools=TOOLS)
        return
    [example] = encoded(data, messages[:2], tools=TOOLS)
    run = check_first_run(data, messages, example)
    assert "add_up" in run
    assert (content or "") in run


CALLING = PLAIN.replace(
    "{{ m.content }}",
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}MARK{{ call.function.name }} "
    "{{ call.function.arguments }}{% endfor %}",
)
"""ChatML with calls of tools behind a mark."""


@pytest.mark.parametrize(
    ("opening", "mark", "special"),
    [
        ("<think>\n", "<tool_call>", ()),
        ("<think>", "<｜tool▁calls▁begin｜>", ("<｜tool▁calls▁begin｜>",)),
        ("[THINK]", "[TOOL_CALLS]", ()),
        ("Thought: ", "Tool: ", ()),
        ("◁think▷", "◁tool▷", ("◁think▷", "◁tool▷")),
    ],
)
def test_a_reply_keeps_what_its_call_shares_with_an_opened_reasoning(opening, mark, special):
    template = CALLING.replace("MARK", mark)
    template = template.replace("assistant\n{% endif %}", f"assistant\n{opening}{{% endif %}}")
    data = data_with(template, special=(*STARTS, *ENDS, *special))
    messages = called({"add_up": None})
    for content in (None, "add_up"):
        messages[1]["content"] = content
        [example] = encoded(data, messages[:2], tools=TOOLS)
        run = check_first_run(data, messages, example)
        assert run.startswith(f"{content or ''}{mark}add_up {{'add_up': None}}")


@has_trl
def test_calls_that_a_template_drops_are_refused():
    with pytest.raises(UserError, match="leaves out a part of a reply, 'add_up'"):
        encoded(data_with(text_of_template("phi3")), called({"a": 23}))


@has_trl
@pytest.mark.parametrize(
    "name", ["smolvlm", "idefics3", "llava_next", "qwen2_5_vl", "gemma3", "qwen2_5"]
)
def test_parts_of_text_are_one_text(name):
    data = data_with(text_of_template(name))
    parts = turns(2)
    for message in parts:
        text = message["content"]
        halves = [{"type": "text", "text": half} for half in (text[:5], text[5:])]
        message["content"] = halves
    as_text = encoded(data, turns(2))
    as_parts = encoded(data, parts)
    assert [one["input_ids"].tolist() for one in as_text] == [
        one["input_ids"].tolist() for one in as_parts
    ]
    parts[0]["content"] = [{"type": "image_url", "image_url": "a.png"}]
    with pytest.raises(UserError, match="part of the type 'image_url', and training reads texts"):
        encoded(data, parts)


def test_a_conversation_that_the_assistant_begins():
    data = data_with(PLAIN)
    messages = [{"role": "assistant", "content": "Hello there."}, *turns(1)]
    [example] = encoded(data, messages)
    texts, _ = trained_runs(data, example)
    assert texts == ["Hello there.<|im_end|>", "It is four, of course.<|im_end|>"]


# ---- what is refused


@has_trl
def test_a_template_that_raises_is_refused_with_its_reason():
    data = data_with(text_of_template("gemma"))
    with pytest.raises(UserError) as caught:
        encoded(data, turns(1, "Be kind."))
    assert str(caught.value) == (
        "The chat template cannot render the conversation 'What is two plus two?' (System role "
        "not supported). Change or remove such rows, or give another template with "
        "`chat_template`."
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("qwen33", "Did you mean 'qwen3'?" if shipped_templates() else "is no template"),
        ("no/such/file.jinja", "is no file"),
        ("{% for m in messages %}", "is no Jinja \\(line 1"),
        ("", "is empty"),
    ],
)
def test_a_chat_template_that_is_none_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        encoded(data_with(PLAIN, chat_template=given), turns(1))


def test_a_chat_template_is_a_text_a_file_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text(MARKED, encoding="utf-8")
    Path("words.txt").write_text("no template", encoding="utf-8")
    for given in (MARKED, "mine.jinja", str(tmp_path / "mine.jinja")):
        data = data_with(None, chat_template=given)
        encoded(data, turns(2))
        assert data.conventions()["chat_template"] == MARKED
    with pytest.raises(UserError, match="is no template: it has no"):
        data_with(None, chat_template="words.txt")
    with pytest.raises(UserError, match=r"Did you mean 'mine.jinja'\?"):
        data_with(None, chat_template="nine.jinja")
    with pytest.raises(TypeError, match="is no text"):
        CausalLMData("unused.csv", chat_template=3)
    named = data_with({"default": PLAIN, "short": MARKED}, chat_template="short")
    encoded(named, turns(1))
    assert named.conventions()["chat_template"] == MARKED
    tools = data_with({"default": PLAIN, "tool_use": MARKED})
    encoded(tools, turns(1), tools=TOOLS)
    assert tools.conventions()["chat_template"] == MARKED


# ---- conversations that are too long


def length_of(messages, template=PLAIN):
    [example] = encoded(data_with(template), messages)
    return len(example["input_ids"])


def test_whole_turns_are_dropped_from_the_left_and_counted(caplog):
    messages = turns(3, "Be kind.")
    kept = [messages[0], *messages[3:]]
    longest = length_of(kept)
    for limit in (longest, longest + 1, length_of(messages) - 1):
        data = data_with(PLAIN, max_length=limit)
        with caplog.at_level(logging.WARNING, "adaptrank"):
            [example] = encoded(data, messages)
        assert text_of(data, example) == text_of(data, *encoded(data_with(PLAIN), kept))
        assert data.truncated == {"train": 1}
    assert (
        f"1 of 1 train rows exceed max_length={longest}: 1 conversations without their first "
        "turns (2 turns)."
    ) in caplog.text
    data = data_with(PLAIN, max_length=longest - 1)
    [example] = encoded(data, messages)
    assert text_of(data, example) == text_of(
        data, *encoded(data_with(PLAIN), [messages[0], *messages[5:]])
    )
    assert len(encoded(data_with(PLAIN, max_length=length_of(messages)), messages)) == 1


@pytest.mark.parametrize("limit", range(61, 82, 4))
def test_role_lines_are_never_cut(limit):
    """The question loses its beginning, and the reply its end."""
    messages = turns(1, "Be kind.")
    question, reply = (message["content"] for message in messages[1:])
    data = data_with(PLAIN, max_length=limit)
    [example] = encoded(data, messages)
    lines = r"<bos><\|im_start\|>system\nBe kind.<\|im_end\|>\n<\|im_start\|>user\n(.+)"
    lines += r"<\|im_end\|>\n<\|im_start\|>assistant\n(.+)"
    asked, said = re.fullmatch(lines, text_of(data, example), re.DOTALL).groups()
    assert question.endswith(asked.strip())
    assert f"{reply}<|im_end|>".startswith(said)
    assert len(example["input_ids"]) <= limit
    assert len(example["input_ids"]) >= limit - 1
    [asked] = encoded(data, messages[:-1], "predict")
    prompt = data.tokenizer.decode(asked["prompt_ids"])
    assert prompt.startswith("<bos><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("?<|im_end|>\n<|im_start|>assistant\n")


def test_a_short_reply_stays_whole_beside_a_long_question():
    messages = turns(1)
    messages[0]["content"] = "Once upon a time. " * 60 + "Who came?"
    data = data_with(PLAIN, max_length=90)
    [example] = encoded(data, messages)
    assert trained_runs(data, example)[0] == ["It is four, of course.<|im_end|>"]
    assert "Who came?<|im_end|>" in text_of(data, example)
    assert len(example["input_ids"]) == 90


def test_a_conversation_without_room_is_left_out_and_counted(caplog):
    data = data_with(PLAIN, max_length=40)
    rows = [{"messages": turns(1, "A very long system prompt. " * 9)}, {"messages": turns(1)}]
    with caplog.at_level(logging.WARNING, "adaptrank"):
        examples = data.encode(rows, "train")
    assert len(examples) == 1
    assert "1 conversations left out" in caplog.text
    assert data.truncated == {"train": 2}
    [prompt] = data.encode([{"messages": rows[0]["messages"][:-1]}], "predict")
    assert "A very long system prompt." in data.tokenizer.decode(prompt["prompt_ids"])


class Chats(CompletionTask):
    """Conversations that are given in Python."""

    def rows(self, split):
        return [{"messages": turns(1)}] * 4


def test_nothing_left_is_an_error():
    data = Chats(max_length=8)
    data.tokenizer = tokenizer_with(PLAIN)
    with pytest.raises(UserError, match="max_length=8 has no room for any of the 4 train rows"):
        data.setup("fit")


def test_each_reply_of_a_changing_template_is_shortened_by_itself():
    messages = turns(3)
    data = data_with(FORGETFUL, max_length=length_of(messages[:2], FORGETFUL))
    examples = encoded(data, messages)
    runs = [text for one in examples for text in trained_runs(data, one)[0]]
    assert [run.removeprefix("<think></think>") for run in runs] == [
        f"{text}<|im_end|>" for text in TEXTS["assistant"]
    ]
    assert all(text_of(data, one).startswith("<|im_start|>user\n") for one in examples)


@has_trl
@pytest.mark.tables
def test_training_templates_are_those_that_trl_names():
    """Files beside each other belong together as TRL says, which a test may import."""
    from trl.chat_template_utils import get_training_chat_template

    pairs = 0
    for name, file in shipped_templates().items():
        if f"{name}_training" not in shipped_templates():
            continue
        tokenizer = tokenizer_with(file.read_text(encoding="utf-8"))
        expected = get_training_chat_template(tokenizer)
        found = training_template(ChatTemplate(tokenizer))
        assert found is not None
        assert found[0].text == expected
        pairs += 1
    assert pairs > 25


def test_a_template_without_a_conversation_is_said(caplog):
    data = data_with(PLAIN, chat_template=MARKED)
    with caplog.at_level(logging.WARNING, "adaptrank"):
        data.encode([{"prompt": "Hi", "completion": " Yo"}], "train")
    assert "`chat_template` has no effect" in caplog.text
    data.chat = True
    [example] = data.encode([{"prompt": "Hi", "completion": " Yo"}], "train")
    assert trained_runs(data, example)[0] == ["Yo<|im_end|>"]
