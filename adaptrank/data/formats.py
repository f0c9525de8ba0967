"""Recognize the format of a table by its columns: conversations, instructions, prompts or text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from adaptrank._errors import UserError, did_you_mean, nearest
from adaptrank.data.sources import FormatName, Source

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold the turns of a conversation, in the order in which they are looked for."""

COLUMNS_OF: dict[str, tuple[str, ...]] = {
    "sharegpt": ("conversations",),
    "openai": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Format -> the columns by which it is known."""

FIELDS_OF: dict[str, tuple[str, ...]] = {
    "sharegpt": ("messages", "tools", "system", "choices", "label", "answer"),
    "openai": ("messages", "tools", "system", "choices", "label", "answer"),
    "alpaca": ("system", "answer"),
    "prompt_completion": ("prompt", "completion", "choices", "label", "answer", "tools"),
    "text": ("text",),
}
"""Format -> the fields that a source may set for it."""

FIELDS = tuple(dict.fromkeys(field for fields in FIELDS_OF.values() for field in fields))
"""All fields of completion tasks."""

UNREADABLE = ("chosen", "rejected", "images", "videos", "audios")
"""Columns of preferences and of other media, which a conversation of texts would lose."""


@dataclass(frozen=True)
class Layout:
    """The format of a table, and its source with the columns of that format filled in.

    Args:
        format: "conversation" for turns of either form, or a name of `FormatName` but "auto".
        source: the source.
        unread: another format that the columns fit, which is not read, or "".
        is_guess: whether the columns decided, and not the source.
    """

    format: str
    source: Source
    unread: str = ""
    is_guess: bool = False


def check_format(name: str | None) -> None:
    """Raise if a value of the key `format` is none of its names.

    Raises:
        UserError: naming the values that fit.
    """
    known = get_args(FormatName)
    if name is not None and name not in known:
        raise UserError(
            f"format={name!r} is unknown. Use one of {', '.join(known)}."
            f"{did_you_mean(str(name), known)}"
        )


def recognize(columns: Sequence[str], source: Source, *, complete: bool = True) -> Layout:
    """Return the format of a table.

    A template of the source for `prompt`, `messages` or `text` decides. Then come the columns, in
    this order: `messages`, `prompt` with a completion, `conversations`, `instruction` with
    `output`, and `text`.

    Args:
        columns: names of the columns of the table.
        source: the source, which may name a format and say how to make fields.
        complete: False for prediction, which needs no completion.

    Raises:
        UserError: if no format fits, if `conversations` stands beside `instruction` and `output`,
            or if the source sets a field that its format does not have.
    """
    if source.format not in (None, "auto"):
        return _named(columns, source)
    by_field = _by_field(source)
    if by_field is not None:
        return Layout(by_field, source)
    return _by_columns(columns, source, complete)


def _by_field(source: Source) -> str | None:
    """Return the format that a template of the source means, or None."""
    given = [name for name in ("prompt", "messages", "text") if _is_set(source, name)]
    if "text" in given and len(given) > 1:
        raise UserError(
            f"{source.path!r} has templates for {' and '.join(map(repr, given))}, which belong to "
            "two formats. Leave one of them out."
        )
    meaning = {"prompt": "prompt_completion", "messages": "conversation", "text": "text"}
    return meaning[given[0]] if given else None


def _by_columns(columns: Sequence[str], source: Source, complete: bool) -> Layout:
    """Return the format that the columns of a table mean."""
    known = [*columns, *(field for field in FIELDS if _is_set(source, field))]
    fitting = [name for name in COLUMNS_OF if _fits(name, known, complete)]
    if "messages" in columns:
        others = [name for name in fitting if name not in ("openai", "text")]
        return Layout("conversation", source, next(iter(others), ""))
    if "prompt_completion" in fitting or _is_set(source, "completion"):
        others = [name for name in fitting if name not in ("prompt_completion", "text")]
        return Layout("prompt_completion", source, next(iter(others), ""))
    chosen = [name for name in fitting if name != "text"]
    if "sharegpt" in fitting and "alpaca" in fitting:
        raise UserError(
            f"{source.path!r} fits two formats, sharegpt and alpaca, by its columns "
            f"{list(columns)}. Set `format` to one of them."
        )
    if not chosen and ("prompt" in columns or not columns):
        # The error of the field that is missing says so.
        return Layout("prompt_completion", source)
    if not fitting:
        raise unknown_shape(columns, source)
    if chosen:
        _refuse_unreadable(columns, source)
    if fitting[0] == "sharegpt":
        column = next(name for name in CONVERSATION_COLUMNS if name in columns)
        return Layout("conversation", replace(source, messages=column), is_guess=True)
    return Layout(fitting[0], source, is_guess=True)


def _fits(name: str, known: Sequence[str], complete: bool) -> bool:
    """Tell whether a table has the columns of a format.

    Args:
        name: the format.
        known: columns of the table, and fields that the source sets.
        complete: False for prediction.
    """
    if name == "sharegpt":
        return any(column in known for column in CONVERSATION_COLUMNS[1:])
    if name == "text":
        # A text alone has nothing to predict.
        return complete and "text" in known
    if name == "prompt_completion" and "choices" in known and "label" in known:
        return "prompt" in known
    needed = COLUMNS_OF[name] if complete else COLUMNS_OF[name][:1]
    return all(column in known for column in needed)


def _named(columns: Sequence[str], source: Source) -> Layout:
    """Return the format that a source names, if the table has its columns."""
    name = str(source.format)
    foreign = [f for f in FIELDS if _is_set(source, f) and f not in FIELDS_OF[name]]
    if foreign:
        raise UserError(
            f"{source.path!r}: format {name} has no field {foreign[0]!r}, only "
            f"{list(FIELDS_OF[name])}. Leave out the field or the format."
        )
    if name in ("sharegpt", "openai"):
        _refuse_unreadable(columns, source)
        return Layout(name, _with_turns(columns, source, name))
    if name == "alpaca" and "instruction" not in columns:
        raise _missing(columns, source, "instruction")
    if name == "text" and "text" not in columns and source.text is None:
        raise _missing(columns, source, "text")
    return Layout(name, source)


def _with_turns(columns: Sequence[str], source: Source, name: str) -> Source:
    """Return a source whose field `messages` names the column of the turns."""
    if source.messages is not None:
        return source
    usual = COLUMNS_OF[name][0]
    known = [column for column in (usual, *CONVERSATION_COLUMNS) if column in columns]
    if not known:
        raise _missing(columns, source, usual, field="messages")
    return replace(source, messages=known[0])


def _missing(
    columns: Sequence[str], source: Source, column: str, field: str | None = None
) -> UserError:
    """Return the error for a column that the named format needs.

    Args:
        columns: the columns that are there.
        source: the source.
        column: the column that is missing.
        field: the field that may name another column for it.
    """
    field = "text" if column == "text" else field
    example = next(filter(None, columns), "column")
    advice = "" if field is None else f" Name another column for it, as in {field}: {example}."
    return UserError(
        f"{source.path!r}: format {source.format} needs a column {column!r}, and there are only "
        f"{list(columns)}.{did_you_mean(column, columns)}{advice}"
    )


def unknown_shape(columns: Sequence[str], source: Source) -> UserError:
    """Return the error for a table that fits no format."""
    formats = [f"{name} ({', '.join(needed)})" for name, needed in COLUMNS_OF.items()]
    example = next(filter(None, columns), "column")
    return UserError(
        f"{source.path!r} fits no format by its columns {list(columns)}. There are "
        f"{', '.join(formats[:-1])} and {formats[-1]}.{_near_column(columns)} Rename the columns, "
        f'or say how to make a field, for example prompt: "{{{example}}}".'
    )


def _near_column(columns: Sequence[str]) -> str:
    """Suggest the column of a format that a name is close to."""
    known = [column for needed in COLUMNS_OF.values() for column in needed]
    for column in columns:
        near = nearest(column, known, cutoff=0.8)
        if near is not None:
            return f" Did you mean {near!r} by {column!r}?"
    return ""


def _refuse_unreadable(columns: Sequence[str], source: Source) -> None:
    """Raise if a table has columns of preferences or of other media."""
    unreadable = [column for column in UNREADABLE if column in columns]
    if unreadable:
        raise UserError(
            f"{source.path!r} has a column {unreadable[0]!r}, which training on completions does "
            "not read. Remove the column if the rest is what you mean to train on."
        )


def _is_set(source: Source, field: str) -> bool:
    return getattr(source, field) is not None
