"""The option `ckpt_path`: a checkpoint that is read before minutes of building."""

import traceback
from pathlib import Path

from adaptrank._errors import UserError
from adaptrank.checkpoints import check_form, read_checkpoint
from adaptrank.cli import errors

KEYWORDS = (None, "best", "last", "hpc")
"""Values that Lightning turns into a path."""


def check_checkpoint_path(path: str | None, weights_only: bool, resumes: bool) -> None:
    """Check the file of a checkpoint.

    Args:
        path: value of `ckpt_path`.
        weights_only: whether pickled objects are refused.
        resumes: whether a run is to go on from it.
    Raises:
        ConfigError: if there is no such file, or it is damaged.
    """
    if path in KEYWORDS or "://" in str(path):
        return
    if not Path(path).is_file():
        raise errors.ConfigError(f"ckpt_path: {errors.missing_file(path, 'checkpoint')}")
    try:
        check_form(read_checkpoint(path, weights_only), path, resumes)
    except UserError as error:
        raise errors.ConfigError(f"ckpt_path: {error}") from error


def explain_restoring(error: BaseException) -> str | None:
    """Return a sentence for an error that arose while Lightning restored a checkpoint, or None."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename.endswith("checkpoint_connector.py") and "restore" in code.co_name:
            lines = str(error).strip().splitlines() or [""]
            return (
                f"ckpt_path: the checkpoint is damaged, or does not belong to this run "
                f"({type(error).__name__}: {errors.shorten(lines[0], 120)}).\n"
                "--debug shows the traceback."
            )
    return None
