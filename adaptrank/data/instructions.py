"""Read tables of instructions: `instruction`, `input` and `output`, as Alpaca has them."""

from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.columns import read_fields
from adaptrank.data.sources import Source
from adaptrank.data.tables import Table
from adaptrank.data.task import Row
from adaptrank.data.tool_calls import decoded
from adaptrank.data.turns import Turn
from adaptrank.data.values import as_text

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
"""Prompt of an instruction without an input, where there is no chat template."""

PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
"""Prompt of an instruction with an input."""


def instruction_rows(
    table: Table, source: Source, *, chat: bool, complete: bool = True
) -> list[Row]:
    """Return conversations, or rows with `prompt` and `completion`.

    In a conversation the user's turn is the instruction and, in a line of its own, the input. Turns
    of `history` come before it, and the system message comes first.

    Args:
        table: a table with the columns `instruction` and `output`, and perhaps `input`, `system`
            and `history`.
        source: the source.
        chat: make conversations.
        complete: False requires an instruction only.

    Raises:
        UserError: if a value is missing or of another kind, or if there is a history without
            `chat`.
    """
    named = _as_prompts(source)
    required = ("prompt", "completion") if complete else ("prompt",)
    fields = ("prompt", "completion", "answer", "system")
    rows = read_fields(table, named, fields, required)
    more = table.rows(["input", "history"])
    made = []
    for k, (row, raw) in enumerate(zip(rows, more, strict=True)):
        where = f"Row {k} of {source.path!r}"
        history = _history_of(raw.get("history"), where)
        given = _text_of(raw.get("input"), f"{where}: input")
        make = _conversation if chat else _prompt
        made.append(make(row, given, history, where))
    return made


def _as_prompts(source: Source) -> Source:
    """Return a source whose prompts are the instructions, and whose completions are the outputs."""
    return Source(
        source.path,
        prompt="instruction",
        completion="output",
        answer=source.answer,
        system=source.system,
        null_is_empty=source.null_is_empty,
    )


def _text_of(value: Any, what: str) -> str:
    """Return a text that may be null."""
    try:
        return "" if value is None else as_text(value)
    except TypeError as error:
        raise UserError(f"{what}: {error}.") from error


def _history_of(value: Any, where: str) -> list[tuple[str, str]]:
    """Return the earlier instructions, each with its response."""
    pairs = decoded(value, f"{where}: history") if value else []
    is_list = isinstance(pairs, list)
    if not is_list or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise UserError(
            f"{where}: history is {repr(value)[:40]}, and not a list of pairs such as "
            '[["instruction", "response"]].'
        )
    texts = [[_text_of(text, f"{where}: history") for text in pair] for pair in pairs]
    return [(asked, answered) for asked, answered in texts]


def _conversation(row: Row, given: str, history: list[tuple[str, str]], where: str) -> Row:
    """Return an instruction as a conversation."""
    messages: list[Turn] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for asked, answered in history:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    asked = f"{row['prompt']}\n{given}" if given else row["prompt"]
    messages.append({"role": "user", "content": asked})
    if "completion" in row:
        messages.append({"role": "assistant", "content": row["completion"]})
    kept = {"answer": row["answer"]} if "answer" in row else {}
    return {"messages": messages, **kept}


def _prompt(row: Row, given: str, history: list[tuple[str, str]], where: str) -> Row:
    """Return an instruction as a prompt with its completion."""
    if history:
        raise UserError(
            f"{where} has a history, which only a conversation can hold. Set `chat: true`, "
            "or in `generate` --chat."
        )
    template = PROMPT_WITH_INPUT if given else PROMPT
    prompt = template.format(instruction=row["prompt"], input=given)
    system = row.pop("system", "")
    return row | {"prompt": f"{system}\n\n{prompt}" if system else prompt}
