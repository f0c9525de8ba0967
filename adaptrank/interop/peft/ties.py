"""Tied tensors of a model, such as the embeddings at its input and its output.

PEFT trains a copy of each module in `modules_to_save`. A copy of one of two tied modules has a
weight of its own, unless PEFT was told to keep the tie (`ensure_weight_tying`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank.artifacts import untied


def untied_tensors(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Return the tensors of modules that were trained whole, each tied tensor of the model once.

    Args:
        model: the base, without the new adapter.
        config: configuration of the adapter.
        tensors: name of a parameter -> its trained value.
        folder: folder of the adapter, which errors name.

    Raises:
        UserError: if the model ties parameters that the adapter holds apart.
    """
    names = tied_names(model)
    kept: dict[str, Tensor] = {}
    for name, value in tensors.items():
        first, *others = names.get(name, [name])
        for other in (first, *others):
            keeps_tie = bool(config.get("ensure_weight_tying")) and other not in tensors
            if other != name and not keeps_tie:
                _check_tied(name, other, tensors, folder)
        kept[first] = value
    return kept


def _check_tied(name: str, other: str, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a tensor that was trained apart from another one with which the model ties it."""
    value, tied_value = tensors[name], tensors.get(other)
    if tied_value is None:
        how = f"and leaves {other} as it was"
    elif not torch.equal(value, tied_value):
        how = f"apart from {other}"
    else:
        return
    raise untied(folder, name, other, how)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return name of a parameter -> all names of it, the one in `named_parameters()` first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tied for tied in names.values() for name in tied}
