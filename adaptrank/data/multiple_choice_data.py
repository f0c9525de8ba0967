"""Questions with choices from files or the Hub."""

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.choice_task import ChoiceTask
from adaptrank.data.columns import read_fields
from adaptrank.data.mixing import SourceMix
from adaptrank.data.optional_fields import OptionalFields, has_field
from adaptrank.data.sources import Source, Sources
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split
from adaptrank.data.values import Unquoted, as_integer, as_text

FIELDS = ("question", "context", "choices", "label")


class MultipleChoiceData(ChoiceTask):
    """Questions with choices from files or the Hub.

    ```yaml
    data:
      class_path: MultipleChoiceData
      init_args: {sources: data/arc, label: answerKey}
    ```
    A row needs `choices` and `label`, and `question` or `context`. Choices are a list of texts, or
    texts with names of their own, as in ARC: {text: [...], label: [A, B, C, D]}, or a list of
    {label, text}. All sources and splits have questions, or none has, and the same holds for
    contexts: a column of another name would be lost. A source without them says so by
    `context: ""`. The label is the name of a choice, a letter (A is the first), the text of a
    choice, or a number.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation, test, predict, val_fraction: as in `CausalLMData`. Prediction needs no label.
        question, context, label: fields for every source that does not set its own.
        choices: field of the choices, or a list of fields, one for each choice, such as
            [ending0, ending1]. In such a list, an empty text is no choice.
        count_from: number of the first choice where labels are numbers, 0 or 1. By default it is 1
            if a training row has the number of its choices as its label and none has 0, else 0.
        null_is_empty: as in `CausalLMData`.
        kwargs: those of `ChoiceTask`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: if count_from is neither 0 nor 1. In `setup`, if a column is missing, also in one
            source or split alone, a row has no choice, or a label is none of the choices.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | float | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        val_fraction: float = 0.1,
        question: str | None = None,
        context: str | None = None,
        choices: str | list[str] | None = None,
        label: str | None = None,
        count_from: int | None = None,
        null_is_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if count_from not in (None, 0, 1) or isinstance(count_from, bool):
            raise UserError(
                f"count_from={count_from!r} is no number of a first choice. Use 0 or 1."
            )
        if isinstance(choices, list) and len(choices) < 2:
            raise UserError(f"choices={choices} leaves nothing to choose. Name two or more fields.")
        self._columns = choices if isinstance(choices, list) else None
        self._count_from = count_from
        settings = {
            "question": question,
            "context": context,
            "choices": choices if isinstance(choices, str) else None,
            "label": label,
            "null_is_empty": null_is_empty,
        }
        self._sources = SourceMix(
            sources, validation, test, predict, val_fraction, self.seed, settings
        )
        self._optional_fields = OptionalFields({"question": "questions", "context": "contexts"})

    def conventions(self) -> dict[str, Any]:
        return super().conventions() | self._optional_fields.conventions()

    def rows(self, split: Split) -> list[Row] | None:
        is_labelled = split != "predict"
        first = self._first_number() if is_labelled else 0

        def read(table: Table, source: Source) -> list[Row]:
            rows = self._read(table, source, is_labelled)
            for k, row in enumerate(rows):
                _settle(row, f"Row {k} of {source.path!r}", first)
            return rows

        return self._sources.rows(split, read)

    def _read(self, table: Table, source: Source, is_labelled: bool) -> list[Row]:
        """Return rows as they stand in the data."""
        fields = [field for field in FIELDS if is_labelled or field != "label"]
        required = ["label"] if is_labelled else []
        if self._columns is None:
            required.append("choices")
        else:
            fields.remove("choices")
        if not has_field(table, source, "context"):
            required.append("question")
        rows = read_fields(table, source, fields, required)
        self._optional_fields.check(table, source)
        for column in self._columns or ():
            one = replace(source, text=column, null_is_empty=True)
            for row, choice in zip(
                rows, read_fields(table, one, ("text",), ("text",)), strict=True
            ):
                row.setdefault("choices", []).append(choice["text"])
        for k, row in enumerate(rows):
            _name_choices(row, f"Row {k} of {source.path!r}")
        return rows

    def _first_number(self) -> int:
        """Return the number of the first choice in labels that are numbers."""
        if self._count_from is None:
            rows = self._sources.rows("train", lambda t, s: self._read(t, s, True)) or []
            self._count_from = first_number(rows)
        return self._count_from


def first_number(rows: Sequence[Row]) -> int:
    """Return 1 if labels that are numbers count the choices from 1, else 0.

    They do if some label is the number of its row's choices, and none is 0.
    """
    reaches_last = False
    for row in rows:
        if row["label"] in row["names"]:
            continue
        number = as_integer(row["label"])
        if number == 0:
            return 0
        reaches_last = reaches_last or number == len(row["choices"])
    return int(reaches_last)


def _name_choices(row: Row, where: str) -> None:
    """Replace the choices of a row by their texts, and add their names, which may be none.

    Raises:
        UserError: if the choices have another form.
    """
    given = row["choices"]
    names: Any = []
    if isinstance(given, dict):
        names, given = given.get("label") or [], given.get("text")
    if isinstance(given, list) and given and all(isinstance(choice, dict) for choice in given):
        names = [choice.get("label") for choice in given]
        given = [choice.get("text") for choice in given]
    if not isinstance(given, list):
        raise UserError(
            f"{where}: choices is {repr(given)[:40]}. Give a list of texts, {{text: [...], label: "
            "[...]}}, or in the key `choices` a list of columns."
        )
    try:
        row["choices"] = [as_text(choice) for choice in given]
        row["names"] = [as_text(name) for name in names if name is not None]
    except TypeError as error:
        raise UserError(f"{where}: {error}, and every choice must be one.") from error


def _settle(row: Row, where: str, first: int) -> None:
    """Turn the label of a row into an index, and leave out choices without a text.

    Raises:
        UserError: if the label is none of the choices, or there is nothing to choose.
    """
    texts: list[str] = row["choices"]
    kept = [k for k, text in enumerate(texts) if text]
    row.setdefault("question", "")
    if not kept:
        raise UserError(f"{where} has no choice with a text. Remove or fill such rows.")
    if "label" in row:
        index = _index_of(row["label"], texts, row["names"], first)
        if index is None or index not in kept:
            raise UserError(
                f"{where}: label {row['label']!r} is none of its {len(kept)} choices. Use "
                f"{first} to {len(texts) + first - 1}, a letter, the name or the text of a choice. "
                "`count_from` says which number the first one has."
            )
        row["label"] = kept.index(index)
    row["choices"] = [texts[k] for k in kept]
    del row["names"]


def _index_of(label: Any, texts: list[str], names: list[str], first: int) -> int | None:
    """Return the index of the choice that a label means, or None."""
    if isinstance(label, bool):
        return int(label)
    if not isinstance(label, str):
        return None
    index: int | None = None
    if str(label) in names:
        index = names.index(str(label))
    elif label in texts and not isinstance(label, Unquoted):
        index = texts.index(label)
    elif len(label) == 1 and label in string.ascii_letters:
        index = string.ascii_uppercase.index(label.upper())
    else:
        number = as_integer(label)
        index = None if number is None else number - first
    return index if index is not None and 0 <= index < len(texts) else None
