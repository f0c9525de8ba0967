"""The folder that a verb writes with --out: refused where something is, written as a whole."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptrank._files import atomic_folder
from adaptrank.cli.errors import ConfigError


def check_out(out: Path, force: bool, sources: Mapping[Path, str]) -> None:
    """Refuse an output folder that holds something, or that is read.

    Args:
        out: the output folder.
        force: whether a folder with files in it may be replaced.
        sources: folder that is read -> what it is, in a word.
    """
    if out.is_file():
        raise ConfigError(f"--out {out} is a file. Name a folder.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError(
            f"--out {out} is not empty. Name another folder, or replace it with --force."
        )
    for source, kind in sources.items():
        resolved = source.resolve()
        if source.exists() and out.resolve() in (resolved, *resolved.parents):
            raise ConfigError(f"--out {out} holds the {kind} that is read. Name another folder.")


def write_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Write a folder as a whole or not at all, without progress bars of transformers."""
    import transformers.utils

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with atomic_folder(out) as folder:
            write(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
