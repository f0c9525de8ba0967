"""Folders of earlier runs of a configuration, and the checkpoints in them."""

from collections.abc import Iterable
from pathlib import Path

from adaptrank.cli.output import run_name


def past_runs(config: Path, runs: Path) -> list[Path]:
    """Return the folders in which a run of a configuration may have left files.

    The first is that of the configuration itself, which a run may have saved there. Then come its
    run folders, the last run first.

    Args:
        config: the configuration file.
        runs: folder of the run folders.
    """
    folders = [config.parent]
    named = runs / run_name(config)
    if named.is_dir():
        numbered = [folder for folder in named.iterdir() if folder.name.isdigit()]
        folders += sorted(numbered, key=lambda folder: int(folder.name), reverse=True)
    return folders


def newest_of_run(folder: Path) -> Path | None:
    """Return the newest checkpoint in the folder of a run, or None."""
    return newest((folder / "checkpoints").glob("*.ckpt"))


def newest(files: Iterable[Path]) -> Path | None:
    """Return the file that was written last, or None."""
    return max(files, key=lambda file: file.stat().st_mtime, default=None)
