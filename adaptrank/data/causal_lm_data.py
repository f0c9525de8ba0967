"""Prompts and completions from files or the Hub."""

from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.columns import read_fields
from adaptrank.data.completion_task import CompletionTask
from adaptrank.data.mixing import SourceMix
from adaptrank.data.prompts import gaps_of
from adaptrank.data.sources import Source, Sources
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split
from adaptrank.data.values import Unquoted, as_integer, as_plain, as_text

COMPLETION_FIELDS = ("prompt", "completion", "answer", "choices", "label", "messages")


class CausalLMData(CompletionTask):
    """Prompts and completions from files or the Hub, for causal language models.

    ```yaml
    data:
      class_path: CausalLMData
      init_args: {sources: data/gsm8k, max_length: 256}  # a folder: train.jsonl, validation.jsonl
    ```
    A row needs `prompt` and `completion`, or `choices` and `label` (the completion is then the
    correct choice), or `messages` (a list of {role, content}). A completion begins with its own
    space and has no end token. Both hold for the columns as well.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation: what to validate on, by default the validation split of every training source,
            or where it has none `val_fraction` of its rows. Those rows are chosen by the seed and
            not trained on. `weight` has no meaning here.
        test: what `test` reads, by default the validation rows.
        predict: what `predict` reads, by default the validation rows. It needs prompts only.
        val_fraction: share of the rows, between 0 and 1.
        prompt, completion, answer, choices, label, messages: fields for every source that does not
            set its own.
        null_is_empty: a null in a text, or in the template of a text, is the empty text. Otherwise
            a row with such a null is refused.
        kwargs: those of `CompletionTask`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: in `setup`, if a column is missing, or a label is none of the choices.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        val_fraction: float = 0.1,
        prompt: str | None = None,
        completion: str | None = None,
        answer: str | None = None,
        choices: str | None = None,
        label: str | None = None,
        messages: str | None = None,
        null_is_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        settings = {
            "prompt": prompt,
            "completion": completion,
            "answer": answer,
            "choices": choices,
            "label": label,
            "messages": messages,
            "null_is_empty": null_is_empty,
        }
        self._sources = SourceMix(
            sources, validation, test, predict, val_fraction, self.seed, settings
        )

    @property
    def prompt_template(self) -> str | None:
        """The format string of all training sources, or None if they differ or name columns."""
        templates = {source.prompt for source in self._sources.training}
        template = templates.pop() if len(templates) == 1 else None
        return template if template is not None and gaps_of(template) else None

    def rows(self, split: Split) -> list[Row] | None:
        def read(table: Table, source: Source) -> list[Row]:
            return completion_rows(table, source, complete=split != "predict")

        return self._sources.rows(split, read)


def completion_rows(table: Table, source: Source, *, complete: bool = True) -> list[Row]:
    """Return rows with prompt and completion, or messages, and the other fields of the source.

    Args:
        table: the table.
        source: the source, which says how to read fields.
        complete: False requires a prompt only.

    Raises:
        UserError: if a field is missing, or a label is none of the row's choices.
    """
    required = _required_fields(table, source, complete)
    rows = read_fields(table, source, COMPLETION_FIELDS, required)
    for k, row in enumerate(rows):
        where = f"Row {k} of {source.path!r}"
        if "prompt" in required:
            row.pop("messages", None)
        else:
            row["messages"] = _settle_messages(row["messages"], where, bool(source.null_is_empty))
        _settle_choices(row, where)
        if complete and "prompt" in required and "completion" not in row:
            raise UserError(
                f"{where} has no 'completion', and no 'choices' with a 'label' in its place. "
                "Remove or fill such rows."
            )
    return rows


def _required_fields(table: Table, source: Source, complete: bool) -> tuple[str, ...]:
    """Return the fields that every row of a table must have."""
    columns = table.column_names

    def has(field: str) -> bool:
        return getattr(source, field) is not None or field in columns

    if has("messages") and source.prompt is None:
        return ("messages",)
    # With choices, the completion is the correct choice.
    has_choices = has("choices") and has("label")
    if complete and not has_choices:
        return ("prompt", "completion")
    return ("prompt",)


def _settle_messages(messages: Any, where: str, null_is_empty: bool) -> list[Row]:
    """Return the turns of a conversation, whose content is the characters in the data.

    Other keys of a turn keep their JSON value, as chat templates expect it.
    """
    example = '{"role": "user", "content": "..."}'
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is no list of turns such as {example}.")
    turns = []
    for k, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: turn {k} of messages has no role. Write {example}.")
        turn = {key: as_plain(value) for key, value in message.items() if value is not None}
        content = message.get("content")
        if content is None and not (null_is_empty or turn.get("tool_calls")):
            raise UserError(
                f"{where}: the content of turn {k} of messages is null. Remove or fill it, or set "
                "`null_is_empty: true`."
            )
        if content is None or isinstance(content, str | bool):
            turn["content"] = "" if content is None else as_text(content)
        turns.append(turn)
    return turns


def _settle_choices(row: Row, where: str) -> None:
    """Turn the label of a row with choices into an index. Drop the fields of an incomplete pair."""
    if "choices" not in row or "label" not in row:
        row.pop("choices", None)
        row.pop("label", None)
        return
    choices = row["choices"]
    if not isinstance(choices, list):
        raise UserError(f"{where}: choices is {repr(choices)[:40]}, and not a list of texts.")
    try:
        row["choices"] = [as_text(choice) for choice in choices]
    except TypeError as error:
        raise UserError(f"{where}: {error}, and every choice must be one.") from error
    row["label"] = choice_index(row["label"], row["choices"], where)
    row.setdefault("completion", " " + row["choices"][row["label"]])


def choice_index(label: Any, choices: list[str], where: str) -> int:
    """Return the index of the correct choice.

    Args:
        label: an index, a letter (A is the first), or the choice's text.
        choices: the texts of the choices.
        where: place of the row, for the error.

    Raises:
        UserError: if the label is none of these.
    """
    index: int | None = None
    if isinstance(label, Unquoted):
        index = as_integer(label)
    elif isinstance(label, bool):
        index = int(label)
    elif isinstance(label, str):
        if label in choices:
            return choices.index(label)
        if len(label) == 1 and label.isupper() and label.isascii():
            index = ord(label) - ord("A")
    if index is not None and 0 <= index < len(choices):
        return index
    raise UserError(
        f"{where}: label {label!r} is none of its {len(choices)} choices. "
        f"Use 0 to {len(choices) - 1}, a letter or the text."
    )
