"""Read tables of conversations, and say what of them is not trained on."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.columns import read_fields
from adaptrank.data.formats import Layout
from adaptrank.data.sources import Source
from adaptrank.data.tables import Table
from adaptrank.data.task import Row
from adaptrank.data.tool_calls import read_tools, without_nulls
from adaptrank.data.turns import ROLES, Turn, read_turns

log = logging.getLogger(__name__)


def conversation_rows(
    table: Table, layout: Layout, fields: Sequence[str], *, complete: bool = True
) -> list[Row]:
    """Return rows with `messages`, `tools` where there are some, and other fields.

    Args:
        table: the table.
        layout: its format, whose source names the column of the turns.
        fields: fields to read beside `messages` and `tools`.
        complete: whether a turn of the assistant has to be there to be trained on.

    Raises:
        UserError: if a row is no conversation, or if nothing of it is trained on.
    """
    source = layout.source
    form = layout.format if layout.format in ("openai", "sharegpt") else None
    more = ("system",) if reads_system(layout) else ()
    rows = read_fields(table, source, (*fields, "messages", "tools", *more), ("messages",))
    for k, row in enumerate(rows):
        where = f"Row {k} of {source.path!r}"
        turns = read_turns(
            _pruned(row["messages"], table),
            where,
            form=form,
            null_is_empty=source.null_is_empty,
        )
        _settle(row, turns, where, table, complete)
    return rows


def turn_pair_rows(table: Table, source: Source, *, complete: bool = True) -> list[Row]:
    """Return conversations whose turns stand in `prompt` and `completion`, as in TRL.

    Only turns in `completion` are trained on.

    Args:
        table: the table, whose prompts are lists of turns.
        source: the source.
        complete: whether a completion has to be there.

    Raises:
        UserError: if a row is no such pair.
    """
    prompts = _read_as_turns(table, source, "prompt", ("answer", "choices", "label", "tools"))
    has_completions = complete or "completion" in table.column_names
    completions: list[Row] = [{} for _ in prompts]
    if has_completions:
        completions = _read_as_turns(table, source, "completion")
    for k, (row, completion) in enumerate(zip(prompts, completions, strict=True)):
        where = f"Row {k} of {source.path!r}"
        empty = source.null_is_empty
        turns = read_turns(_pruned(row["messages"], table), f"{where}: prompt", null_is_empty=empty)
        for turn in turns:
            if turn["role"] == "assistant":
                turn["weight"] = 0
        if completion:
            replies = _pruned(completion["messages"], table)
            turns += read_turns(replies, f"{where}: completion", null_is_empty=empty)
        _settle(row, turns, where, table, complete)
    return prompts


def has_turn_pairs(table: Table, source: Source) -> bool:
    """Tell whether the prompts of a table are lists of turns."""
    column = (source.prompt or "prompt").strip("{}")
    if column not in table.column_names:
        return False
    values = (row.get(column) for row in table.rows([column]))
    first = next((value for value in values if value is not None), None)
    return isinstance(first, list) and any(isinstance(turn, dict) for turn in first)


def _read_as_turns(
    table: Table, source: Source, field: str, others: Sequence[str] = ()
) -> list[Row]:
    """Return rows whose `messages` are the turns in a field, with other fields."""
    given = {name: getattr(source, name) for name in others}
    named = Source(
        source.path,
        messages=getattr(source, field) or field,
        null_is_empty=source.null_is_empty,
        **given,
    )
    return read_fields(table, named, (*others, "messages"), ("messages",))


def _pruned(value: Any, table: Table) -> Any:
    """Return turns without the keys that the file of a table fills with nulls."""
    return without_nulls(value) if table.fills_nulls else value


def _settle(row: Row, turns: list[Turn], where: str, table: Table, complete: bool) -> None:
    """Put the turns of a conversation into its row, with its system message and its tools."""
    system = row.pop("system", None)
    if system:
        if turns[0]["role"] == "system" and turns[0]["content"] != system:
            raise UserError(
                f"{where} has two system messages, in its column and in its turns. Keep one."
            )
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
    row["messages"] = turns
    tools = read_tools(_pruned(row.pop("tools", None), table), where)
    if tools:
        row["tools"] = tools
    if complete:
        _check_trained(turns, where)


def _check_trained(turns: list[Turn], where: str) -> None:
    """Raise if no turn of a conversation is trained on."""
    replies = [turn for turn in turns if turn["role"] == "assistant"]
    if not replies:
        roles = sorted({turn["role"] for turn in turns})
        raise UserError(
            f"{where}: the conversation has no assistant turn to train on (its roles are {roles}). "
            "Remove such rows, or name the roles system, user and assistant."
        )
    if not any(turn.get("weight") != 0 for turn in replies):
        raise UserError(
            f"{where}: the conversation has no assistant turn to train on, because every one is "
            "left out by its weight or train. Remove such rows."
        )


def reads_system(layout: Layout) -> bool:
    """Tell whether the column `system` becomes the first turn of conversations."""
    is_named = layout.source.system is not None
    return is_named or layout.is_guess or layout.format == "sharegpt"


def report_turns(rows: Sequence[Row], source: Source, *, complete: bool = True) -> None:
    """Warn of turns that are empty, that no reply follows, or whose role is unknown.

    Args:
        rows: rows, of which those with `messages` are conversations.
        source: their source.
        complete: False for prediction, where no reply is expected.
    """
    conversations = [row["messages"] for row in rows if "messages" in row]
    unknown: Counter[str] = Counter()
    empty = open_ended = 0
    for turns in conversations:
        open_ended += complete and turns[-1]["role"] != "assistant"
        for turn in turns:
            empty += turn["content"] == "" and "tool_calls" not in turn
            if turn["role"] not in ROLES:
                unknown[turn["role"]] += 1
    if empty:
        log.warning("%d turns of %r are empty.", empty, source.path)
    if open_ended:
        log.warning(
            "%d of %d conversations of %r end with a turn that no reply follows. Nothing is "
            "trained on after the last reply.",
            open_ended,
            len(conversations),
            source.path,
        )
    for role, count in unknown.items():
        log.warning(
            "%d turns of %r have the role %r. It is left to the chat template, and not trained "
            "on.%s",
            count,
            source.path,
            role,
            did_you_mean(role, ROLES),
        )
