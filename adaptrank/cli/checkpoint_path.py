"""The option `ckpt_path`: a checkpoint that is read before minutes of building."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.checkpoints import check_form, read_checkpoint
from adaptrank.cli import errors
from adaptrank.cli.output import say
from adaptrank.cli.past_runs import newest, newest_of_run, past_runs

KEYWORDS = ("best", "last", "hpc")
"""Values in place of a path. Lightning looks for them in the folder of the run that starts."""


def find_checkpoint(options: Mapping[str, Any], config: str | None, resumes: bool) -> str | None:
    """Return the path of a checkpoint, which may be given by a keyword such as "last".

    Args:
        options: the configuration, of which `ckpt_path`, `runs` and `trainer` are read.
        config: the last configuration file, or None.
        resumes: whether a run is to go on from it. Without one it then starts anew, and says so.
    Raises:
        ConfigError: if a keyword finds no file.
    """
    path = options.get("ckpt_path")
    if path not in KEYWORDS:
        return path
    config = config or "config.yaml"
    folders = past_runs(Path(config), Path(options["runs"]))
    found = resolve_keyword(path, folders, options["trainer"])
    nothing = f"ckpt_path: no run of {config} has left a checkpoint"
    if found is None and not resumes:
        raise errors.ConfigError(
            f"{nothing}. Give the path of one, such as runs/NAME/0/checkpoints/step=60.ckpt."
        )
    if resumes:
        new = f"{nothing}, so training starts anew."
        say(new if found is None else f"Goes on from the checkpoint {found}")
    return found


def resolve_keyword(path: str, folders: Sequence[Path], trainer: Any) -> str | None:
    """Return the path of a checkpoint that is named by a keyword.

    A run starts in a folder of its own. So its checkpoints of before are in other folders, where
    Lightning does not look.

    Args:
        path: "last", "best" or "hpc".
        folders: folders of earlier runs, the nearest first.
        trainer: the section `trainer` of the configuration.
    Returns:
        The path, or None if "last" finds no checkpoint. Lightning finds that of "hpc" itself.
    Raises:
        ConfigError: for "best", and for "hpc" if there is no such file.
    """
    of_runs = [newest_of_run(folder) for folder in folders]
    of_last_run = next((file for file in of_runs if file is not None), None)
    if path == "last":
        own = list(_in_own_folders(trainer))
        last = newest(own if of_last_run is None else [*own, of_last_run])
        return None if last is None else str(last)
    root = trainer.get("default_root_dir")
    if path == "best":
        reason = "best is known only while its run trains"
    elif root is not None and any(Path(root).glob("hpc_ckpt_*.ckpt")):
        return path
    else:
        reason = "trainer.default_root_dir names no folder with an hpc_ckpt_*.ckpt"
    example = of_last_run or "runs/NAME/0/checkpoints/step=60.ckpt"
    raise errors.ConfigError(f"ckpt_path: {reason}. Give last, or a file, such as {example}.")


def _in_own_folders(trainer: Any) -> Iterator[Path]:
    """Yield the files of the configured `ModelCheckpoint`s that have a folder of their own."""
    configured = trainer.get("callbacks") or []
    for callback in configured if isinstance(configured, list) else [configured]:
        arguments = callback.get("init_args") or {}
        dirpath = arguments.get("dirpath")
        if dirpath is not None:
            yield from Path(dirpath).glob("*.ckpt")


def check_checkpoint_path(path: str | None, weights_only: bool, resumes: bool) -> None:
    """Check the file of a checkpoint.

    Args:
        path: value of `ckpt_path`.
        weights_only: whether pickled objects are refused.
        resumes: whether a run is to go on from it.
    Raises:
        ConfigError: if there is no such file, or it is damaged.
    """
    if path is None or path in KEYWORDS or "://" in path:
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
