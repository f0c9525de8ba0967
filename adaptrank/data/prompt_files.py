"""Read the prompts of a data file as training and `predict` read them, by an adapter's record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.causal_lm_data import completion_rows, tell_of
from adaptrank.data.conversations import report_turns
from adaptrank.data.files import load_file
from adaptrank.data.formats import check_format, recognize
from adaptrank.data.instructions import PROMPT
from adaptrank.data.locations import kind_of
from adaptrank.data.prompt_columns import KNOWN_COLUMNS, PROMPT_FIELDS, PromptSettings, fits_columns
from adaptrank.data.prompts import fill_prompt
from adaptrank.data.sources import Source
from adaptrank.data.task import Row


def is_table(file: Path) -> bool:
    """Tell whether a file has columns by its name, rather than a prompt in each line."""
    return kind_of(file) not in (None, "text")


def file_prompts(
    file: Path,
    *,
    template: str | None = None,
    recorded: Sequence[PromptSettings] = (),
    chat: bool = False,
    raw: bool = False,
) -> list[Row]:
    """Return rows with `prompt`, or with `messages` and perhaps `tools`, as `predict` makes them.

    A file has the columns of training, or those of a format of `CausalLMData`. Where it has a
    column `prompt` instead of the columns of the template, each text is put into the template.

    Args:
        file: the file.
        template: format string of training's prompts.
        recorded: how training made prompts of columns (see `prompt_columns`).
        chat: make conversations of instructions.
        raw: take the column `prompt` as it is.

    Raises:
        UserError: if the file cannot be read, if it has no prompts, or if a row has none.
    """
    table = load_file(file)
    path = str(file)
    columns = table.column_names
    if not len(table):
        raise UserError(f"{path!r} has no rows, and so no prompts.")
    if raw:
        template = None
        source = _raw_source(columns, path)
    else:
        source = _fitting_source(columns, path, template, recorded)
    layout = recognize(columns, source, complete=False)
    rows = completion_rows(table, layout, chat=chat, complete=False)
    tell_of(layout, table)
    report_turns(rows, layout.source, complete=False)
    if template is None or source.prompt is not None or layout.format != "prompt_completion":
        return rows
    return [_filled(row, template, f"Row {k} of {path!r}") for k, row in enumerate(rows)]


def _raw_source(columns: Sequence[str], path: str) -> Source:
    """Return a source whose prompts are the texts in the column `prompt`."""
    if "prompt" not in columns:
        raise UserError(
            f"{path!r} has no column 'prompt' to take as it is, only {list(columns)}. Rename the "
            "column of the prompts."
        )
    return Source(path, format="prompt_completion")


def _fitting_source(
    columns: Sequence[str], path: str, template: str | None, recorded: Sequence[PromptSettings]
) -> Source:
    """Return a source that reads a table as training read its own."""
    if not recorded and template not in (None, PROMPT):
        # Adapters of earlier versions, and data without files, record the template alone. For
        # instructions it is that of a row without an input.
        recorded = [{"prompt": str(template)}]
    fitting = [settings for settings in recorded if fits_columns(settings, columns)]
    if len(fitting) > 1:
        raise UserError(
            f"{path!r} fits several sources of training by its columns {list(columns)}: "
            f"{', '.join(map(str, fitting))}. Write whole prompts into a column 'prompt', and use "
            "--raw."
        )
    if fitting:
        settings: dict[str, Any] = {
            field: value for field, value in fitting[0].items() if field in PROMPT_FIELDS
        }
        check_format(settings.get("format"))
        return Source(path, **settings)
    if not any(column in columns for column in KNOWN_COLUMNS):
        trained = []
        for each in recorded:
            trained += [repr(each[key]) for key in ("prompt", "messages") if key in each]
        of_training = f"the columns of training ({', '.join(trained)}) or " if trained else ""
        raise UserError(
            f"{path!r} has the columns {list(columns)}, and no prompts. It needs {of_training}a "
            f"column of {', '.join(KNOWN_COLUMNS)}."
        )
    return Source(path)


def _filled(row: Row, template: str, where: str) -> Row:
    """Return a row whose text is put into the template."""
    if "prompt" not in row:
        return row
    try:
        return row | {"prompt": fill_prompt(template, row["prompt"])}
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
