"""Atomic writes: after an error or a crash, a file or a folder is complete or as it was.

Each function writes to a temporary name in the same parent folder, and renames it at the end.
Readers never see a part of a file. The temporary name starts with a dot and ends with ".new".
It stands in the same folder, so that the rename never crosses file systems, wherever TMPDIR is.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptrank._errors import RunError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors that mean: there is no room for more bytes."""


ARCHIVE = ("PytorchStreamWriter failed writing", "enforce fail at inline_container", "iostream")
"""Words of the errors of PyTorch's writer of archives, which come without a number."""


class WriteError(RunError, OSError):
    """A file for which there is no room. What stood in its place before is whole."""


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `file` if the block ends without an error.

    Several of these in one `with` statement are renamed from the last to the first. None of them is
    renamed if the block fails.

    ```python
    with atomic_file(folder / "table.json") as temporary:
        temporary.write_text(text)
    ```
    """
    temporary = temporary_name(file)
    try:
        with named_if_full(file):
            yield temporary
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files move into `folder` if the block ends without an error.

    Each file moves as a whole, and replaces a file of the same name. Other files in `folder` stay.
    The folder and its parents are made if they do not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder / "files")
    try:
        with named_if_full(folder):
            temporary.mkdir()
            yield temporary
            for file in sorted(temporary.iterdir()):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which replaces `folder` if the block ends without an error.

    A folder that is replaced goes away with all of its files. It comes back if the last rename
    fails. The parents of the folder are made if they do not exist.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    replaced = temporary.with_suffix(".old")
    try:
        with named_if_full(folder):
            temporary.mkdir()
            yield temporary
        if folder.exists():
            os.replace(folder, replaced)
        try:
            os.replace(temporary, folder)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write text as UTF-8, atomically. The folder of the file must exist."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, data: Any) -> None:
    """Write data as indented JSON with a final line break, atomically."""
    write_text(file, json.dumps(data, indent=2) + "\n")


def append_text(file: Path, text: str) -> None:
    """Append text as UTF-8. After an error the file is as it was before.

    Raises:
        WriteError: if there is no room for the text.
    """
    size = file.stat().st_size if file.is_file() else None
    with named_if_full(file):
        try:
            with file.open("ab") as stream:
                stream.write(text.encode())
        except OSError:
            if size is None:
                file.unlink(missing_ok=True)
            else:
                os.truncate(file, size)
            raise


@contextmanager
def named_if_full(path: Path) -> Iterator[None]:
    """Turn any library's error about a full disk into one sentence that names the file.

    Raises:
        WriteError: if the block failed for lack of room.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        reason = _no_room(error)
        if reason is None:
            raise
        raise WriteError(
            f"{path} could not be written: {reason}. An older file of that name is whole. Make "
            f"room there, or write to another folder."
        ) from error


def _no_room(error: BaseException) -> str | None:
    """Return the system's words if an error says that there is no room, else None."""
    if isinstance(error, OSError):
        number = error.errno
    else:
        # safetensors quotes the number of the system. PyTorch's writer of archives has none.
        quoted = re.search(r"os error (\d+)", str(error))
        number = int(quoted[1]) if quoted else None
        if isinstance(error, RuntimeError) and any(words in str(error) for words in ARCHIVE):
            number = errno.ENOSPC
    return os.strerror(number) if number in NO_ROOM else None


def temporary_name(path: Path) -> Path:
    """Return the name beside `path` that this process writes to before it renames."""
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def leftovers(path: Path) -> list[Path]:
    """Return what killed processes left of earlier writes of `path`.

    Call it only where no other process can be writing `path`, such as inside a file lock.
    """
    return sorted(path.parent.glob(f".{path.name}.*.new"))
