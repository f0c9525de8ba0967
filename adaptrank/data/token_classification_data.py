"""Sentences and the tags of their words, from files or the Hub."""

from collections.abc import Sequence
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.class_index import ClassIndex, parse_class, sort_labels
from adaptrank.data.collate import IGNORED
from adaptrank.data.columns import read_fields
from adaptrank.data.conll_files import read_conll
from adaptrank.data.label_form import declared_in
from adaptrank.data.mixing import SourceMix
from adaptrank.data.sources import Source, Sources
from adaptrank.data.tables import Part, Table, TextPart
from adaptrank.data.task import Row, Split
from adaptrank.data.text_files import read_lines
from adaptrank.data.token_task import TokenTask
from adaptrank.data.values import as_text

OUTSIDE = "O"
"""Tag of a word that belongs to no entity. It is the first class."""

NO_TAG = str(IGNORED)
"""Tag of a word that is neither trained on nor scored."""


class TokenClassificationData(TokenTask):
    """Sentences and the tags of their words, from files or the Hub.

    ```yaml
    data:
      class_path: TokenClassificationData
      init_args: {sources: data/conll2003, tags: ner_tags}  # train.jsonl, validation.jsonl
    ```
    A row needs `tokens`, a list of words, and `tags`, a list with the class of each word: its name
    or its index. In a CoNLL file (.conll, .conllu, .bio, .iob, .txt) each line has a word and its
    tags, and a blank line ends a sentence. There the first column is `tokens`, the last one is
    `tags`, and each is also `column_1`, `column_2` and so on.

    The names of the classes are `classes`, or those in the `labels.json` (a list) beside the file,
    or those that the data set declares, or else the different tags of the training rows: O first,
    and the others sorted by kind. The tag -100 is none. Where a trained adapter goes on, its
    classes keep their numbers, by name.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation, test, predict, val_fraction: as in `CausalLMData`. Prediction needs no tags.
        classes: names of the classes in the order of their indices.
        tokens, tags: fields for every source that does not set its own.
        kwargs: those of `TokenTask`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: if `classes` names a class twice. In `setup`, if a column is missing, a row has
            not one tag for each word, or a tag is none of the classes.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | float | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        val_fraction: float = 0.1,
        classes: list[str] | None = None,
        tokens: str | None = None,
        tags: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._index = ClassIndex(classes)
        self._sources = SourceMix(
            sources,
            validation,
            test,
            predict,
            val_fraction,
            self.seed,
            {"tokens": tokens, "tags": tags},
        )

    @property
    def class_names(self) -> list[str] | None:
        return self._index.names

    def setup(self, stage: str | None = None) -> None:
        if self.needs_classes(stage):
            self._find_classes()
        super().setup(stage)

    def rows(self, split: Split) -> list[Row] | None:
        is_tagged = split != "predict"
        if is_tagged:
            self._find_classes()

        def read(table: Table, source: Source) -> list[Row]:
            table = as_sentences(table, source)
            rows = tagged_rows(table, source, tagged=is_tagged)
            if is_tagged:
                self._number_tags(rows, source, table.class_names(tag_column(source)))
            return rows

        return self._sources.rows(split, read)

    def _number_tags(self, rows: list[Row], source: Source, declared: list[str] | None) -> None:
        """Replace the tags of rows by the indices of their classes.

        Args:
            rows: the rows.
            source: their source, for the error.
            declared: names of the classes by number, where the column of the tags declares them.
        """
        indices = None if declared is None else self._index.of_column(declared)
        for k, row in enumerate(rows):
            tags: list[int] = []
            for word, tag in zip(row["tokens"], row["tags"], strict=True):
                where = f"Row {k} of {source.path!r}, word {len(tags)} ({word!r})"
                known = tag != NO_TAG
                tags.append(self._index.index(tag, where, indices) if known else IGNORED)
            row["tags"] = tags

    def _find_classes(self) -> None:
        """Find the names of the classes, unless they are known."""
        if self._index.names is None:
            names = declared_in(self._sources, "tags") or self._tags_of_rows()
            self._index = ClassIndex(names)

    def _tags_of_rows(self) -> list[str]:
        """Return the different tags of the training rows, sorted."""

        def read(table: Table, source: Source) -> list[Row]:
            return tagged_rows(as_sentences(table, source), source, tagged=True)

        tags: dict[str, None] = {}
        for row in self._sources.rows("train", read) or []:
            tags.update(dict.fromkeys(row["tags"]))
        return sort_tags([tag for tag in tags if tag != NO_TAG])


def sort_tags(tags: Sequence[str]) -> list[str]:
    """Sort different tags: O first, then by kind, and B-X before I-X."""
    ordered = sort_labels(tags)
    ordered.sort(key=lambda tag: (tag != OUTSIDE, tag.partition("-")[2] or tag))
    return ordered


def tag_column(source: Source) -> str:
    """Return the name of the column that holds the tags."""
    return (source.tags or "tags").strip("{}")


def as_sentences(table: Table, source: Source) -> Table:
    """Return a table of the sentences of CoNLL files, where their names end in .txt.

    Raises:
        UserError: if a slice of such a file is asked for, which would count lines.
    """
    of_lines = [
        part for part in table.parts if isinstance(part, TextPart) and part.read is read_lines
    ]
    if not of_lines:
        return table
    if source.split is not None and "[" in source.split:
        raise UserError(
            f"split={source.split!r} of {source.path!r} would count lines and not sentences. "
            "Rename the file to end in .conll."
        )
    parts: list[Part] = [TextPart(part.file, read_conll) for part in of_lines]
    return Table(parts)


def tagged_rows(table: Table, source: Source, *, tagged: bool) -> list[Row]:
    """Return rows with `tokens`, and with `tags` if asked for, as they stand in the data.

    Raises:
        UserError: if a field is missing, is no list of texts, or the lists differ in length.
    """
    fields = ("tokens", "tags") if tagged else ("tokens",)
    rows = read_fields(table, source, fields, fields)
    for k, row in enumerate(rows):
        where = f"Row {k} of {source.path!r}"
        for field in fields:
            if not isinstance(row[field], list):
                raise UserError(f"{where}: {field} is {repr(row[field])[:40]}, and no list.")
        if not row["tokens"]:
            raise UserError(f"{where} has no words. Remove such rows.")
        try:
            row["tokens"] = [as_text(token) for token in row["tokens"]]
        except TypeError as error:
            raise UserError(f"{where}: {error}, and every word must be one.") from error
        if not tagged:
            continue
        if len(row["tags"]) != len(row["tokens"]):
            raise UserError(
                f"{where} has {len(row['tokens'])} tokens and {len(row['tags'])} tags. Give each "
                "word one tag."
            )
        row["tags"] = [parse_class(tag, where) for tag in row["tags"]]
    return rows
