"""Atomic writes: after an error or a crash, a file or a folder is complete or as it was.

Each function writes to a temporary name in the same parent folder, and renames it at the end.
Readers never see a part of a file. The temporary name starts with a dot and ends with ".new".
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def temporary_name(path: Path) -> Path:
    """Return the name beside `path` that this process writes to before it renames."""
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def leftovers(path: Path) -> list[Path]:
    """Return what killed processes left of earlier writes of `path`.

    Call it only where no other process can be writing `path`, such as inside a file lock.
    """
    return sorted(path.parent.glob(f".{path.name}.*.new"))
