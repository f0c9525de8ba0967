"""Make a model's folder in the cache once, for all processes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from adaptrank._files import named_if_full


def make_once(folder: Path, write: Callable[[Path], None], announcement: str, failure: str) -> None:
    """Make a model's folder, unless another process has already done so.

    Other processes see the folder either complete or not at all.

    Args:
        folder: where the model goes.
        write: function that writes the model into an empty folder.
        announcement: sentence for stderr, before the work begins.
        failure: what could not be done, for the error.

    Raises:
        OSError: if the folder cannot be written.
    """
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            # Another process may have made the folder while this one waited.
            if not is_made(folder):
                print(announcement, file=sys.stderr)
                _write_beside(folder, write)
    except OSError as error:
        # On some file systems the lock does not hold, and another process may have been first.
        if is_made(folder):
            return
        raise OSError(
            f"{failure} ({error.strerror or error}). "
            "Set ADAPTRANK_CACHE to a folder that can be written, with 1 GB free."
        ) from error


def is_made(folder: Path) -> bool:
    """Tell whether a folder holds a model."""
    return (folder / "config.json").is_file()


def _write_beside(folder: Path, write: Callable[[Path], None]) -> None:
    """Write into a temporary folder beside `folder`, and rename it when it is complete."""
    prefix = f".{folder.name}.tmp"
    # A process that was killed leaves its temporary folder behind.
    for abandoned in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with named_if_full(folder):
            write(temporary)
        # `mkdtemp` and `save_pretrained` write for one user only, and a cache may be shared.
        temporary.chmod(0o755)
        for part in temporary.iterdir():
            part.chmod(0o644)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
