"""Tensors of the base in a PEFT file: only those that its configuration declares."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserError


def declared_tensors(
    config: Mapping[str, Any],
    trained_whole: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    tied: Mapping[str, list[str]],
    folder: Path,
) -> dict[str, Tensor]:
    """Return the tensors of modules that `modules_to_save` names, and refuse any other.

    PEFT stores embeddings beside an adapter in some cases. They are left out if they are those of
    this model.

    Args:
        config: configuration of the adapter.
        trained_whole: name -> tensor of the file.
        present: name -> tensor of the model.
        tied: name -> all names of this tensor, where the model ties parameters.
        folder: folder of the adapter, which errors name.
    Returns:
        name -> tensor.
    Raises:
        UserError: names the tensor.
    """
    kept: dict[str, Tensor] = {}
    declared = config.get("modules_to_save") or []
    if not isinstance(declared, list) or not all(isinstance(name, str) for name in declared):
        raise UserError(f"{folder} has modules_to_save={declared!r}, which are no names.")
    for key, value in trained_whole.items():
        if _is_declared([key, *tied.get(key, [])], declared):
            kept[key] = value
            continue
        own = present.get(tied.get(key, [key])[0])
        if own is None or own.shape != value.shape or not _equal(own, value):
            raise UserError(
                f"{folder} holds {key}, which its modules_to_save does not name; it would change "
                f"the base without a word."
            )
    return kept


def _is_declared(keys: list[str], declared: list[str]) -> bool:
    return any(_lies_in(key, name) for key in keys for name in declared)


def _lies_in(key: str, name: str) -> bool:
    """Return whether a tensor belongs to a module of this name, as PEFT matches names.

    The path of the module, or of a module around it, ends in the name.
    """
    components = key.split(".")[:-1]
    return any(
        ".".join(components[:count]).endswith(name) for count in range(1, len(components) + 1)
    )


def _equal(own: Tensor, value: Tensor) -> bool:
    return torch.equal(own.detach(), value.to(own))
