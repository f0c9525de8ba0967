"""Read rows of text files exactly: CSV, TSV, JSON, JSON Lines and plain lines.

No type is guessed. Every reader yields (number of the line where a row begins, row), and holds one
row in memory. A JSON file with one list is the exception: its text is held as a whole.
"""

import bz2
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from adaptrank._errors import UserError, some
from adaptrank.data.values import JSON, RepeatedKeyError

NumberedRow = tuple[int, dict[str, Any]]
"""Number of the line where a row begins, and the row."""

Reader = Callable[[Path], Iterator[NumberedRow]]
"""Function file -> its rows."""

OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""First bytes of a compressed file -> the class that reads it."""

FOREIGN = {
    b"PK\x03\x04": "it is a zip archive (or a spreadsheet). Unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd. Unpack it, or compress it by gzip",
    b"PAR1": "it is a Parquet file. Rename it to end in .parquet",
    b"ARROW1": "it is an Arrow file. Rename it to end in .arrow",
    b"%PDF": "it is a PDF file",
    b"\x89PNG": "it is an image",
    b"\xff\xfe": "it is UTF-16. Save it as UTF-8",
    b"\xfe\xff": "it is UTF-16. Save it as UTF-8",
}
"""First bytes of a file that holds no UTF-8 text -> the reason to say."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def unreadable(file: Path, kind: str, reason: str, line: int | None = None) -> UserError:
    """Return the error for a file that cannot be read."""
    place = "" if line is None else f", line {line},"
    return UserError(f"{str(file)!r}{place} cannot be read as {kind}: {reason}.")


@contextmanager
def opened(file: Path, kind: str) -> Iterator[IO[bytes]]:
    """Open a file as bytes. Decompress a file of gzip, bzip2 or xz while it is read.

    Raises:
        UserError: if the file cannot be opened, is foreign, or ends amid compressed data.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
        opener = next((op for magic, op in OPENERS.items() if start.startswith(magic)), None)
        with opener(file) if opener else file.open("rb") as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise unreadable(
            file, kind, f"its compressed data are damaged or cut off ({error})"
        ) from error
    except OSError as error:
        raise unreadable(file, kind, str(error.strerror or error)) from error


def lines(file: Path, kind: str) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines of a UTF-8 file. Line ends are kept, and only LF is one.

    Raises:
        UserError: if the file is foreign or a line is not UTF-8.
    """
    with opened(file, kind) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                _refuse_foreign(file, kind, line)
                line = line.removeprefix(BYTE_ORDER_MARK)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                reason = f"byte 0x{byte:02x} is not UTF-8. Save the file as UTF-8"
                raise unreadable(file, kind, reason, number) from error
            if "\0" in text:
                reason = "a zero byte is no text. Save the file as UTF-8"
                raise unreadable(file, kind, reason, number)
            yield number, text


def _refuse_foreign(file: Path, kind: str, start: bytes) -> None:
    for magic, reason in FOREIGN.items():
        if start.startswith(magic):
            raise unreadable(file, kind, reason)


# ---- plain lines


def read_lines(file: Path) -> Iterator[NumberedRow]:
    """Yield one row {"text": ...} for every line that is not empty, without its line end."""
    for number, line in lines(file, "text"):
        text = line.removesuffix("\n").removesuffix("\r")
        if text:
            yield number, {"text": text}


# ---- cells


def read_csv(file: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a file whose cells are separated by commas."""
    return _read_cells(file, "csv", ",")


def read_tsv(file: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a file whose cells are separated by tabs."""
    return _read_cells(file, "tsv", "\t")


def _read_cells(file: Path, kind: str, delimiter: str) -> Iterator[NumberedRow]:
    """Yield rows of cells by the names in the first line. Each cell is the text in it.

    Empty lines are skipped. A cell in quotes may hold line ends, which stay as they are. In a file
    with tabs it may not hold both: many such files quote nothing, and a quote that means itself
    would take in all lines up to the next one.
    """
    # The limit is one for the process. A cell may be as long as a text is.
    csv.field_size_limit(max(csv.field_size_limit(), sys.maxsize))
    texts = (text for _, text in lines(file, kind))
    cells = csv.reader(texts, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in cells:
            if row and header is None:
                header = row
                _check_header(header, file, kind, line)
            elif row and header is not None:
                if len(row) != len(header):
                    reason = f"it has {len(row)} cells, and the first line has {len(header)}"
                    raise unreadable(
                        file, kind, f"{reason}. Quote cells with a {delimiter!r}", line
                    )
                if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in row):
                    reason = f"a quote opens a cell that ends in line {cells.line_num}"
                    cure = "Double a quote that means itself, and put its cell in quotes"
                    raise unreadable(file, kind, f"{reason}, with tabs in it. {cure}", line)
                yield line, dict(zip(header, row, strict=True))
            line = cells.line_num + 1
    except csv.Error as error:
        raise unreadable(file, kind, _csv_reason(error), line) from error


def _csv_reason(error: csv.Error) -> str:
    said = str(error)
    if "unexpected end" in said:
        return "a quote opens a cell and is never closed. Double a quote that means itself"
    if "expected after" in said:
        return 'text follows a closing quote. Double a quote that means itself, as in "a ""b"""'
    if "new-line" in said:
        return "its lines end in CR alone. Save it with LF or CRLF"
    return said


def _check_header(header: list[str], file: Path, kind: str, line: int) -> None:
    """Raise if two columns have one name. Several may be unnamed, because no field uses them."""
    repeated = [name for name in dict.fromkeys(header) if name and header.count(name) > 1]
    if repeated:
        reason = f"two columns are named {some(map(repr, repeated))}. Give each a name of its own"
        raise unreadable(file, kind, reason, line)


# ---- JSON


def read_json(file: Path) -> Iterator[NumberedRow]:
    """Yield the objects of a JSON file: one in every line, or all of them in one list."""
    numbered = lines(file, "json")
    is_first = True
    for number, text in numbered:
        if not text.strip():
            continue
        if is_first and text.lstrip().startswith("["):
            rest = "".join(line for _, line in numbered)
            yield from _read_list(file, text + rest, number)
            return
        is_first = False
        with _json_errors(file, number, number):
            row = JSON.decode(text.rstrip())
            _check_object(row, text)
        yield number, row


def _read_list(file: Path, text: str, first_line: int) -> Iterator[NumberedRow]:
    """Yield the objects of a list in JSON, one by one."""
    position = _skip_space(text, text.index("[") + 1)
    separator = "]" if text.startswith("]", position) else ","
    line, counted = first_line, 0
    while separator == ",":
        line += text.count("\n", counted, position)
        counted = position
        with _json_errors(file, first_line, line):
            row, end = JSON.raw_decode(text, position)
            _check_object(row, text[position:end])
            position = _skip_space(text, end)
            separator = text[position : position + 1]
            if separator not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        yield line, row
        position = _skip_space(text, position + 1)
    if text[position:].strip("] \t\r\n"):
        raise unreadable(file, "json", "something follows the list of its rows")


def _skip_space(text: str, position: int) -> int:
    while text.startswith((" ", "\t", "\r", "\n"), position):
        position += 1
    return position


class _NoRowError(ValueError):
    """A JSON value that is no row."""


def _check_object(value: Any, text: str) -> None:
    """Raise if a value is no object, or has a part of a character that UTF-8 cannot write."""
    if not isinstance(value, dict):
        raise _NoRowError(
            f"{text.strip()[:40]!r} is no object. A row is an object such as "
            '{"prompt": "...", "completion": "..."}'
        )
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise _NoRowError(
                "it has half of a character (a surrogate without its pair)"
            ) from error


@contextmanager
def _json_errors(file: Path, first_line: int, row_line: int) -> Iterator[None]:
    """Say the errors of the JSON decoder in one sentence.

    Args:
        file: the file.
        first_line: number of the first line that the decoder is given.
        row_line: number of the line where the row begins.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        reason = (
            f"{error.msg} (column {error.colno}). Write one object a line, or a list of objects"
        )
        raise unreadable(file, "json", reason, first_line + error.lineno - 1) from error
    except (RepeatedKeyError, _NoRowError) as error:
        raise unreadable(file, "json", str(error), row_line) from error
    except RecursionError as error:
        raise unreadable(file, "json", "it is nested too deep", row_line) from error
