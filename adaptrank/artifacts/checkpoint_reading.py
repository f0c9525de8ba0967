"""Read a checkpoint, or say in one sentence why it cannot be one."""

import importlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserError

FOR_A_RUN = ("loops", "optimizer_states", "lr_schedulers", "callbacks")
"""Keys without which a run cannot go on."""


def read_checkpoint(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """Load a checkpoint of Lightning.

    Args:
        path: the file.
        weights_only: whether to refuse pickled objects.
    Raises:
        UserError: in one sentence, if the file is damaged, is no checkpoint of Lightning, or
            holds pickled objects.
        OSError: if there is no such file.
    """
    path = Path(path)
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{path} is an empty file, and no checkpoint.")
    if path.is_file() and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no Lightning checkpoint, or it is damaged.")
    try:
        checkpoint: Any = _load(path, weights_only)
    except (FileNotFoundError, PermissionError, IsADirectoryError, UserError):
        raise
    except Exception as error:
        raise explain_damage(path, error) from error
    check_form(checkpoint, path)
    loaded: dict[str, Any] = checkpoint
    return loaded


def _load(path: Path, weights_only: bool) -> Any:
    """Load a file onto the CPU. The state of a torchao optimizer takes an import of torchao."""
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not _forbidden_name(error).startswith("torchao."):
            raise
        try:
            importlib.import_module("torchao.optim")
        except ImportError:
            raise UserError(
                f"{path} holds the state of an optimizer of torchao, which is not installed here; "
                "install torchao."
            ) from None
        return torch.load(path, map_location="cpu", weights_only=weights_only)


def _forbidden_name(error: BaseException) -> str:
    """Return the name of the pickled object that PyTorch refused, or ""."""
    found = re.search(r"[Uu]nsupported global:(?: GLOBAL)? (\S+)", str(error))
    return found.group(1) if found else ""


def explain_damage(path: str | Path, error: BaseException) -> UserError:
    """Return the error of a file that could not be loaded, as one sentence."""
    forbidden = _forbidden_name(error)
    if isinstance(error, pickle.UnpicklingError) and forbidden:
        return UserError(
            f"{path} holds a pickled object, {forbidden}, which may run code when it is "
            "loaded. If you trust the file, `fit` and `test` take it with --weights_only false, "
            "and Trainer.fit with weights_only=False."
        )
    return UserError(f"{path} is no Lightning checkpoint, or it is damaged ({_short(error)}).")


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0].strip().rstrip(".") if lines else ""
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__


def check_form(checkpoint: Any, path: str | Path | None = None, resumes: bool = False) -> None:
    """Check that loaded data have the form of a Lightning checkpoint.

    Args:
        checkpoint: what was loaded.
        path: the file, for the error.
        resumes: whether a run goes on from it, for which it needs more than weights.
    Raises:
        UserError: naming the part that is missing or wrong.
    """
    subject = "The checkpoint" if path is None else str(path)
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise UserError(f"{subject} is no Lightning checkpoint: it holds a {kind}, not a mapping.")
    state = checkpoint.get("state_dict")
    if "pytorch-lightning_version" not in checkpoint or not isinstance(state, Mapping):
        lacks = "state_dict" if not isinstance(state, Mapping) else "pytorch-lightning_version"
        raise UserError(
            f"{subject} is no Lightning checkpoint, or it is damaged: it has no {lacks!r}."
        )
    odd = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise UserError(
            f"{subject} is damaged: {odd} in its state_dict is a {type(state[odd]).__name__}, "
            "not a tensor."
        )
    missing = [key for key in FOR_A_RUN if key not in checkpoint]
    if resumes and missing:
        if "optimizer_states" in missing:
            raise UserError(
                f"{subject} holds weights without the state of a run (no {missing[0]!r}), so a run "
                "cannot go on from it. Save with save_weights_only=False, or evaluate it."
            )
        raise UserError(f"{subject} is damaged: it has no {missing[0]!r}.")
    if resumes:
        _check_states(checkpoint, subject)


def _check_states(checkpoint: Mapping[str, Any], subject: str) -> None:
    """Check the parts of a checkpoint that Lightning reads without a look."""
    kinds: tuple[tuple[str, type], ...] = (
        ("loops", Mapping),
        ("callbacks", Mapping),
        ("optimizer_states", list),
        ("lr_schedulers", list),
    )
    for key, kind in kinds:
        if not isinstance(checkpoint[key], kind):
            raise UserError(f"{subject} is damaged: its {key!r} is no {kind.__name__.lower()}.")
    if not isinstance(checkpoint["loops"].get("fit_loop"), Mapping):
        raise UserError(f"{subject} is damaged: its 'loops' have no 'fit_loop'.")
    for state in checkpoint["optimizer_states"]:
        if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
            raise UserError(f"{subject} is damaged: the state of an optimizer is not whole.")
