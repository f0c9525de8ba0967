"""Describe a data set, and which of its columns hold which field."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

FormatName = Literal["auto", "sharegpt", "openai", "alpaca", "prompt_completion", "text"]
"""Values of the key `format`."""


@dataclass
class Source:
    """A data set, and which of its columns hold which field.

    A field is the name of a column, or a format string over columns, such as
    "Question: {question}\\nAnswer:". The string "{options[text]}" reaches inside a column, and ""
    is the empty text. A field that is left out takes the data module's setting, and without one
    the column of the same name.

    A text is the characters that stand in the data. No number, date or word is converted.

    Args:
        path: a file or a pattern of files (.json, .jsonl, .csv, .tsv, .txt, .parquet, .arrow, and
            of CoNLL .conll, .conllu, .bio, .iob, also compressed as .gz, .bz2, .xz), a folder with
            such files named after their splits, a folder written by `save_to_disk`, or the name of
            a data set on the Hub.
        name: configuration of a Hub data set.
        split: split to take, also a slice such as "train[:10%]", by default the one that the source
            serves as.
        weight: how often every row appears in an epoch: 2 is twice, 0.5 a seeded half of the rows.
        format: format of the rows: auto, sharegpt, openai, alpaca, prompt_completion or text.
        null_is_empty: a null in a text or in its template is the empty text. Otherwise a row with
            such a null is refused.
    """

    path: str
    name: str | None = None
    split: str | None = None
    weight: float = 1.0
    prompt: str | None = None
    completion: str | None = None
    answer: str | None = None
    choices: str | None = None
    label: str | None = None
    messages: str | None = None
    text: str | None = None
    text_pair: str | None = None
    tokens: str | None = None
    tags: str | None = None
    source: str | None = None
    target: str | None = None
    question: str | None = None
    context: str | None = None
    image: str | None = None
    null_is_empty: bool | None = None
    tools: str | None = None
    system: str | None = None
    format: FormatName | None = None


if TYPE_CHECKING:
    Sources = str | Sequence[Source]
else:
    # Where a list of classes may stand, jsonargparse takes a string for the path of a
    # configuration. It reads the file and puts the contents in place of the path, so that a CSV
    # would be lost before it arrives here. In place of a tuple it does not.
    Sources = str | tuple[Source, ...]
