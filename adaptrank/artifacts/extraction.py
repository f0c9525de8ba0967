"""An adapter out of a checkpoint, without its backbone and without running any code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adaptrank._errors import UserError, some
from adaptrank.artifacts.adapter import write_described
from adaptrank.artifacts.base_weights import trained_modules
from adaptrank.artifacts.contents import adapter_tensors
from adaptrank.artifacts.header import FORMAT_VERSION, check
from adaptrank.artifacts.saving_checks import not_finite

TENSORS = "adapter_tensors"
"""Key of a checkpoint: where the tensors of its adapter are, see `locate_tensors`."""


def locate_tensors(root: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Say where a checkpoint of `root` holds the tensors that `save_adapter(model)` would write.

    Args:
        root: the module whose state dict is saved.
        model: the part of it with the adapters.
    Returns:
        {"keys": {key in an adapter's file: key in the state dict}, "gated": {key in an adapter's
        file: tensor with the gates of an allocator multiplied in}}.
    """
    paths = {module: path for path, module in root.named_modules()}
    keys, gated = {}, {}
    for entry in adapter_tensors(model, None):
        path = paths[entry.wrapper]
        keys[entry.key] = f"{path}.{entry.name}" if path else entry.name
        if entry.wrapper.gates and entry.value().data_ptr() != entry.tensor.data_ptr():
            gated[entry.key] = entry.value().clone()
    prefix = paths[model]
    for name in trained_modules(model):
        keys[name] = f"{prefix}.{name}" if prefix else name
    return {"keys": keys, "gated": gated}


def extract_adapter(
    checkpoint: Mapping[str, Any], description: Mapping[str, Any], file: Path, folder: Path
) -> None:
    """Write the adapter of a checkpoint, as `save_adapter` would have at its step.

    Args:
        checkpoint: contents of the checkpoint, with the key `TENSORS`.
        description: of the adapter, as `describe_adapter` makes it.
        file: the checkpoint, for error messages.
        folder: made if it does not exist.
    Raises:
        UserError: if the checkpoint is damaged, or a tensor is not finite.
    """
    described = json.loads(json.dumps(dict(description)))
    # The form is checked as that of a file is. The digest is made later.
    check({**described, "format_version": FORMAT_VERSION, "digest": ""}, file)
    described["run"] = {"weights": "checkpoint", "step": int(checkpoint.get("global_step", 0))}
    places = _places(checkpoint[TENSORS], file)
    tensors = _tensors(checkpoint["state_dict"], places, described["tied"], file)
    bad = not_finite(tensors)
    if bad:
        raise UserError(
            f"{file} holds {len(bad)} tensors that are not finite ({some(bad, 3)}): no adapter is "
            f"made of it. Take an earlier checkpoint."
        )
    write_described(folder, described, tensors)


def _places(places: Any, file: Path) -> Mapping[str, Any]:
    """Return what `locate_tensors` said, or refuse anything else."""
    whole = isinstance(places, Mapping) and {"keys", "gated"} <= places.keys()
    if not whole or not all(isinstance(places[key], Mapping) for key in ("keys", "gated")):
        raise UserError(f"{file} is damaged: it does not say where its adapter's tensors are.")
    found: Mapping[str, Any] = places
    return found


def _tensors(
    state_dict: Mapping[str, Tensor],
    places: Mapping[str, Any],
    tied: Mapping[str, str],
    file: Path,
) -> dict[str, Tensor]:
    tensors = {}
    for key, place in places["keys"].items():
        if key in tied:
            continue
        tensor = places["gated"].get(key, state_dict.get(place))
        if not isinstance(tensor, Tensor):
            raise UserError(f"{file} is damaged: it says that it holds {place}, and does not.")
        tensors[key] = tensor.detach().contiguous()
    return tensors
