"""Read sentences of CoNLL files: one word a line with its tags in columns, a blank line after each.

A row has the list of each column under `column_1`, `column_2` and so on. The words are also under
`tokens` and the tags under `tags`, which are the first and the last column. In CoNLL-U files they
are the columns FORM and UPOS.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaptrank.data.text_files import NumberedRow, lines, unreadable

Line = tuple[int, list[str]]
"""Number of a line, and its columns."""

DOCUMENT = "-DOCSTART-"
"""First column of a line that begins a document. It is no word."""

ENTITY_TAG = re.compile(r"O|[BIESLUM][-_].+")
"""Tag of an entity, such as B-PER. A # may be a word with such a tag."""

UNIVERSAL_COLUMNS = 10
"""Columns of a word in a CoNLL-U file."""


def read_conll(file: Path) -> Iterator[NumberedRow]:
    """Yield the sentences of a CoNLL file, as rows of `tokens` (first column) and `tags` (last).

    Columns are separated by tabs in a line with a tab, and by spaces in another. Lines that begin
    with a # before the words of a sentence are comments if they have another number of columns than
    a word, or no tag where a word has a tag of an entity.
    """
    for sentence in _sentences(file, "conll"):
        comments = 0
        while _is_comment(sentence[comments][1], sentence[-1][1]):
            comments += 1
        yield _row(file, "conll", sentence[comments:], words=0, tags=-1)


def _is_comment(columns: list[str], word: list[str]) -> bool:
    """Tell whether a line before a sentence is a comment, given the columns of a word of it."""
    if not columns[0].startswith("#"):
        return False
    has_tag = ENTITY_TAG.fullmatch(columns[-1]) is not None
    return len(columns) != len(word) or (ENTITY_TAG.fullmatch(word[-1]) is not None and not has_tag)


def read_conllu(file: Path) -> Iterator[NumberedRow]:
    """Yield the sentences of a CoNLL-U file, as rows of `tokens` (FORM) and `tags` (UPOS).

    Comments, ranges of several words (1-2) and empty nodes (1.1) are left out.
    """
    for sentence in _sentences(file, "conllu"):
        words = [line for line in sentence if not line[1][0].startswith("#")]
        words = [line for line in words if line[1][0].isdecimal() or _is_damaged(line)]
        if not words:
            continue
        number, columns = words[0]
        if len(columns) != UNIVERSAL_COLUMNS:
            reason = f"a word has {len(columns)} columns, and CoNLL-U has {UNIVERSAL_COLUMNS}"
            raise unreadable(file, "conllu", reason, number)
        yield _row(file, "conllu", words, words=1, tags=3)


def _is_damaged(line: Line) -> bool:
    """Tell whether a line is neither a word, nor a range, nor an empty node."""
    return not line[1][0].replace("-", "").replace(".", "").isdecimal()


def _sentences(file: Path, kind: str) -> Iterator[list[Line]]:
    """Yield the lines of each sentence, without lines that begin a document."""
    sentence: list[Line] = []
    for number, text in lines(file, kind):
        columns = _columns(text)
        if columns and columns[0] != DOCUMENT:
            sentence.append((number, columns))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _columns(text: str) -> list[str]:
    """Return the columns of a line, or [] of a blank one."""
    if not text.strip():
        return []
    if "\t" in text:
        return [column.strip() for column in text.rstrip("\r\n").split("\t")]
    return text.split()


def _row(file: Path, kind: str, sentence: list[Line], words: int, tags: int) -> NumberedRow:
    """Return the row of a sentence.

    Args:
        file: the file, for the error.
        kind: its kind, for the error.
        sentence: the lines of the sentence.
        words: index of the column of the words.
        tags: index of the column of the tags.

    Raises:
        UserError: if lines of the sentence have different numbers of columns.
    """
    first, columns = sentence[0]
    for number, others in sentence:
        if len(others) != len(columns):
            reason = (
                f"a word has {len(others)} columns, and the first word of its sentence has "
                f"{len(columns)}. Separate sentences by a blank line"
            )
            raise unreadable(file, kind, reason, number)
    row: dict[str, Any] = {
        f"column_{k + 1}": [line[1][k] for line in sentence] for k in range(len(columns))
    }
    row["tokens"] = [line[1][words] for line in sentence]
    if len(columns) > 1:
        row["tags"] = [line[1][tags] for line in sentence]
    return first, row
