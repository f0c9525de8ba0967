"""Files that a configuration names: what they held when a point ran, and whether they changed."""

import glob
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MOST_CONTENT = 1 << 26
"""Bytes of a file or a folder whose content is compared. Further files count by their size."""
OUTPUTS = ("trainer", "runs")
"""Sections of a configuration whose paths are written to, by loggers and others."""

Inputs = dict[str, str]
"""Path or pattern, as the configuration names it -> digest of the files there."""


def read_inputs(config: Mapping[str, Any], out: Path) -> Inputs:
    """Return the digests of all files and folders that a configuration reads.

    A text of the configuration is a path if files lie there. Files of the study itself are
    left out, such as the ranks that a replay reads.

    Args:
        config: the configuration, as plain data.
        out: folder of the study.
    """
    sections = [section for key, section in config.items() if key not in OUTPUTS]
    digests = {text: digest_of(text, out) for text in _texts(sections)}
    return {text: digest for text, digest in digests.items() if digest}


def digest_of(path: str, out: Path) -> str:
    """Return a digest of the files behind a path, "" if there are none.

    Args:
        path: a file, a folder with all that is in it, or a pattern of files.
        out: folder of the study, which is left out.
    """
    digest = hashlib.blake2b(digest_size=8)
    left = MOST_CONTENT
    files = [file for file in _files(path) if not _is_inside(file, out)]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file} {size};".encode())
        left -= size
        if left >= 0:
            digest.update(file.read_bytes())
    return digest.hexdigest() if files else ""


def _files(text: str) -> list[Path]:
    """Return the files behind a text, in order. There are none if it is no path."""
    path = Path(text).expanduser()
    try:
        if path.is_file():
            return [path]
        if text and path.is_dir():
            return [file for file in sorted(path.rglob("*")) if file.is_file()]
        matches = glob.glob(str(path), recursive=True) if glob.has_magic(text) else []
        return [Path(match) for match in sorted(matches) if Path(match).is_file()]
    except (OSError, ValueError):  # a text that is too long for a path, or has a null character
        return []


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of plain data. Names of keys are no values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
