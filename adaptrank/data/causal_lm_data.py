"""Prompts and completions from files or the Hub."""

from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError
from adaptrank.data.columns import read_fields
from adaptrank.data.completion_task import CompletionTask
from adaptrank.data.mixing import SourceMix
from adaptrank.data.prompts import gaps_of
from adaptrank.data.sources import Source, Sources
from adaptrank.data.task import Row, Split

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

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
        def read(data: "Dataset", source: Source) -> list[Row]:
            return completion_rows(data, source, complete=split != "predict")

        return self._sources.rows(split, read)


def completion_rows(data: "Dataset", source: Source, *, complete: bool = True) -> list[Row]:
    """Return rows with prompt and completion, or messages, and the other fields of the source.

    Args:
        data: the data set.
        source: the source, which says how to read fields.
        complete: False requires a prompt only.

    Raises:
        UserError: if a field is missing, or a label is none of the row's choices.
    """
    required = _required_fields(data, source, complete)
    rows = read_fields(data, source, COMPLETION_FIELDS, required)
    for k, row in enumerate(rows):
        for field in ("prompt", "completion", "answer"):
            if field in row:
                row[field] = str(row[field])
        if "prompt" in required:
            row.pop("messages", None)
        _settle_choices(row, f"Row {k} of {source.path!r}")
    return rows


def _required_fields(data: "Dataset", source: Source, complete: bool) -> tuple[str, ...]:
    """Return the fields that every row of a data set must have."""

    def has(field: str) -> bool:
        return getattr(source, field) is not None or field in data.column_names

    if has("messages") and source.prompt is None:
        return ("messages",)
    # With choices, the completion is the correct choice.
    has_choices = has("choices") and has("label")
    if complete and not has_choices:
        return ("prompt", "completion")
    return ("prompt",)


def _settle_choices(row: Row, where: str) -> None:
    """Turn the label of a row with choices into an index. Drop the fields of an incomplete pair."""
    if "choices" not in row or "label" not in row:
        row.pop("choices", None)
        row.pop("label", None)
        return
    row["choices"] = [str(choice) for choice in row["choices"]]
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
    index = label
    if isinstance(label, str):
        if label in choices:
            return choices.index(label)
        if len(label) == 1 and label.isupper() and label.isascii():
            index = ord(label) - ord("A")
    if isinstance(index, int) and 0 <= index < len(choices):
        return index
    raise UserError(
        f"{where}: label {label!r} is none of its {len(choices)} choices. "
        f"Use 0 to {len(choices) - 1}, a letter or the text."
    )
