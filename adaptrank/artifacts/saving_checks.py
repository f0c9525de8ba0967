"""Check a model and a folder before an adapter is written."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adaptrank._errors import UserError, some
from adaptrank.parameterizations import wrapped_layers, wrappers

log = logging.getLogger("adaptrank")


def check_target(folder: Path, weights: Path, config: Path, header_key: str) -> None:
    """Refuse a folder that is a file, or that holds an adapter of another library.

    Args:
        folder: the folder to write.
        weights: its safetensors file.
        config: its configuration file.
        header_key: key in the header of the library's own safetensors files.
    """
    taken = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if taken is not None and not taken.is_dir():
        raise UserError(f"{taken} is a file; name a folder for the adapter.")
    for file in (weights, config):
        if file.is_dir():
            raise UserError(f"{file} is a folder, where a file of the adapter belongs.")
    if _is_foreign(weights, config, header_key):
        raise UserError(
            f"{folder} holds an adapter of another library, which would be replaced; "
            f"name another folder."
        )


def _is_foreign(weights: Path, config: Path, header_key: str) -> bool:
    """Tell whether files of these names are readable and not the library's own."""
    if weights.is_file():
        try:
            with safe_open(weights, framework="pt") as stored:
                return header_key not in (stored.metadata() or {})
        except SafetensorError:
            return False
    if not config.is_file():
        return False
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and "peft_type" in content


def check_values(model: nn.Module) -> None:
    """Refuse wrappers on the meta device, which have shapes and no values."""
    for path, layer in wrapped_layers(model).items():
        for wrapper in layer.nest:
            if any(tensor.is_meta for tensor in wrapper.own_tensors().values()):
                raise UserError(
                    f"{path or 'The model'} is on the meta device and has no values to save; load "
                    f"the model with its weights first."
                )


def warn_of_disabled(model: nn.Module, names: Collection[str] | None) -> None:
    """Log one line if some of the saved adapters are switched off, since a file has them on."""
    saved = [wrapper for wrapper in wrappers(model) if names is None or wrapper.name in names]
    off = dict.fromkeys(wrapper.name for wrapper in saved if not wrapper.enabled)
    on = dict.fromkeys(wrapper.name for wrapper in saved if wrapper.enabled)
    if off and on:
        log.warning(
            "Adapters that are switched off are saved too, and are on when the file is loaded "
            "(%s): save_adapter(..., names=%r) writes those that are on.",
            some(off),
            list(on),
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold a number which is not finite."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
