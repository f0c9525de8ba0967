"""Prompts and completions, conversations, instructions and texts from files or the Hub."""

import logging
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.columns import read_fields
from adaptrank.data.completion_task import CompletionTask
from adaptrank.data.conversations import (
    conversation_rows,
    has_turn_pairs,
    reads_system,
    report_turns,
    turn_pair_rows,
)
from adaptrank.data.documents import document_rows
from adaptrank.data.formats import Layout, check_format, recognize
from adaptrank.data.instructions import PROMPT, instruction_rows
from adaptrank.data.mixing import SourceMix
from adaptrank.data.optional_fields import OptionalFields
from adaptrank.data.prompt_columns import prompt_columns
from adaptrank.data.prompts import gaps_of
from adaptrank.data.sources import FormatName, Source, Sources
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split
from adaptrank.data.values import Unquoted, as_integer, as_text

log = logging.getLogger(__name__)

SCORED_FIELDS = ("answer", "choices", "label")
"""Fields of every format by which completions are scored."""

OPTIONAL_COLUMNS = {
    "alpaca": ("input", "history", "system"),
    "conversation": ("tools",),
    "openai": ("tools",),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("tools",),
}
"""Format -> columns that are read into its prompts where they are there."""

COMPLETION_FIELDS = ("prompt", "completion", *SCORED_FIELDS)


class CausalLMData(CompletionTask):
    """Texts to complete from files or the Hub, for causal language models.

    ```yaml
    data:
      class_path: CausalLMData
      init_args: {sources: data/gsm8k, max_length: 256}  # a folder: train.jsonl, validation.jsonl
    ```
    A row has `prompt` and `completion`, or `choices` and `label` in place of the completion, which
    is then the correct choice. A completion begins with its own space and has no end token. Rows of
    conversations, of instructions and of plain text are recognized by their columns, or by
    `format`:

    | format | columns |
    | --- | --- |
    | `sharegpt` | `conversations`, turns of {from, value}. Perhaps `system` and `tools` |
    | `openai` | `messages`, turns of {role, content}. Perhaps `tools` |
    | `alpaca` | `instruction` and `output`. Perhaps `input`, `system` and `history` |
    | `prompt_completion` | `prompt` and `completion`, texts or lists of turns |
    | `text` | `text`, all of whose tokens are trained on |

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation: what to validate on, by default the validation split of every training source,
            or where it has none `val_fraction` of its rows. Those rows are chosen by the seed and
            not trained on. `weight` has no meaning here. A number, such as 0.1, is a
            `val_fraction`.
        test: what `test` reads, by default the validation rows.
        predict: what `predict` reads, by default the validation rows. It needs prompts only.
        val_fraction: share of the rows, between 0 and 1.
        prompt, completion, answer, choices, label, messages, text, tools, system: fields for every
            source that does not set its own.
        format: format of every source that does not set its own. By "auto" the columns decide.
        null_is_empty: a null in a text, or in the template of a text, is the empty text. Otherwise
            a row with such a null is refused.
        kwargs: those of `CompletionTask`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: if `format` is unknown. In `setup`, if the columns fit no format, if a column is
            missing, or if a row does not fit its format.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | float | None = None,
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
        text: str | None = None,
        tools: str | None = None,
        system: str | None = None,
        format: FormatName = "auto",
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
            "text": text,
            "tools": tools,
            "system": system,
            "format": format,
        }
        self._sources = SourceMix(
            sources, validation, test, predict, val_fraction, self.seed, settings
        )

        for given in self._sources.all_sources():
            check_format(given.format)
        # Formats of the training sources that are read by now.
        self._formats: set[str] = set()
        # Format -> the optional columns of its tables that are read by now.
        self._optional: dict[str, OptionalFields] = {}
        # Optional columns that are known to be missing somewhere.
        self._missing: set[str] = set()

    @property
    def prompt_template(self) -> str | None:
        """The format string of all training sources, or None if they differ or name columns."""
        if self._formats == {"alpaca"}:
            return None if self.chat else PROMPT
        templates = {source.prompt for source in self._sources.training}
        template = templates.pop() if len(templates) == 1 else None
        return template if template is not None and gaps_of(template) else None

    @property
    def prompt_columns(self) -> list[dict[str, str | bool]]:
        return prompt_columns(self._sources.training)

    def rows(self, split: Split) -> list[Row] | None:
        complete = split != "predict"
        # Training sources are read once more for the rows that are held back.
        is_first_time = split == "train" or self._sources.by_split[split] is not None

        def read(table: Table, source: Source) -> list[Row]:
            layout = recognize(table.column_names, source, complete=complete)
            if split == "train":
                self._formats.add(layout.format)
            rows = completion_rows(table, layout, chat=self.chat, complete=complete)
            if is_first_time:
                tell_of(layout, table)
                report_turns(rows, layout.source, complete=complete)
            self._tell_of_missing(layout, table)
            return rows

        return self._sources.rows(split, read)

    def _tell_of_missing(self, layout: Layout, table: Table) -> None:
        """Warn once of each optional column that some tables of a format have and others lack."""
        is_sharegpt = layout.format == "conversation" and layout.is_guess
        name = "sharegpt" if is_sharegpt else layout.format
        columns = dict.fromkeys(OPTIONAL_COLUMNS.get(name, ()), "")
        optional = self._optional.setdefault(name, OptionalFields(columns))
        for column, with_column, without in optional.differences(table, layout.source):
            if column in self._missing:
                continue
            self._missing.add(column)
            log.warning(
                "%s has a column %r, and %s has none. If it has another name there, rename it: it "
                "is not read.",
                with_column,
                column,
                without,
            )


def completion_rows(
    table: Table, layout: Layout, *, chat: bool = False, complete: bool = True
) -> list[Row]:
    """Return rows with prompt and completion, messages, or text, and the fields of their scores.

    Args:
        table: the table.
        layout: its format.
        chat: make conversations of instructions.
        complete: False requires a prompt only.

    Raises:
        UserError: if a field is missing, or if a row does not fit its format.
    """
    source = layout.source
    if layout.format == "text":
        return document_rows(table, source, complete=complete)
    if layout.format == "alpaca":
        return instruction_rows(table, source, chat=chat, complete=complete)
    if layout.format != "prompt_completion":
        is_older = layout.format == "conversation" and not layout.is_guess
        beside = COMPLETION_FIELDS if is_older else SCORED_FIELDS
        rows = conversation_rows(table, layout, beside, complete=complete)
    elif has_turn_pairs(table, source):
        rows = turn_pair_rows(table, source, complete=complete)
    else:
        rows = _prompt_rows(table, source, complete)
    for k, row in enumerate(rows):
        _settle_choices(row, f"Row {k} of {source.path!r}")
        needs_completion = complete and "messages" not in row
        if needs_completion and "completion" not in row:
            raise UserError(
                f"Row {k} of {source.path!r} has no 'completion', and no 'choices' with a 'label' "
                "in its place. Remove or fill such rows."
            )
    return rows


def tell_of(layout: Layout, table: Table) -> None:
    """Say how a table was recognized, and which of its columns are not read."""
    path = layout.source.path
    name = "a conversation in each row" if layout.format == "conversation" else layout.format
    if layout.unread:
        log.warning(
            "%r is read as %s. It has the columns of the format %s, too, which are not read. Set "
            "`format` to choose.",
            path,
            name,
            layout.unread,
        )
    elif layout.is_guess:
        log.info("%r is read as %s, by its columns.", path, name)
    is_conversation = layout.format in ("conversation", "openai")
    if is_conversation and "system" in table.column_names and not reads_system(layout):
        log.warning(
            "The column 'system' of %r is not read. `system: system` puts it before the turns.",
            path,
        )


def _prompt_rows(table: Table, source: Source, complete: bool) -> list[Row]:
    """Return rows with texts as prompts and completions."""
    columns = table.column_names

    def has(field: str) -> bool:
        return getattr(source, field) is not None or field in columns

    # With choices, the completion is the correct choice.
    has_choices = has("choices") and has("label")
    required = ("prompt", "completion") if complete and not has_choices else ("prompt",)
    return read_fields(table, source, COMPLETION_FIELDS, required)


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
