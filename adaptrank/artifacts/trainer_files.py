"""The model's part of a transformers Trainer's checkpoint: the adapter, without the frozen base.

| file | contents |
| --- | --- |
| `model.safetensors` | what trains, under the names of the state dict, and the allocators' state |
| `adapter_model.safetensors`, `adapter_config.json` | the adapter, as `save_adapter` writes it |
| `config.json` | lets every `from_pretrained` refuse the folder, by a sentence |

The Trainer itself reads `model.safetensors` by `load_state_dict(..., strict=False)`. Hooks on the
model give the axes the stored sizes first. The file differs from the adapter where an allocator has
gates: an adapter has them multiplied in, and a run that goes on multiplies them again.
"""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adaptrank._errors import UserError, some
from adaptrank._files import atomic_file, write_json
from adaptrank.artifacts.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from adaptrank.axes import CLOSED, fit_ranks, rank_axes
from adaptrank.injection import trained_ids
from adaptrank.parameterizations import (
    CONFIG_FILE,
    HOW_TO_LOAD,
    TRAINER_WRITER,
    Parameterization,
    is_refused_by_from_pretrained,
    refused_by_from_pretrained,
)

TRAINED = "model.safetensors"
"""Name of the file that the Trainer reads."""

RUN_STATE = "adaptrank.run_state"
"""Key in that file of the allocators' state: the bytes of `torch.save`."""


class TakesRunState(Protocol):
    """Takes the allocators' state of a checkpoint that a model is loaded from."""

    def take_run_state(self, state: Mapping[str, Any]) -> None:
        """Remember the state for the next start."""


def write_trainer_files(model: nn.Module, folder: Path, run_state: Mapping[str, Any]) -> None:
    """Write the adapter of a model for use, and what a Trainer needs to go on with it.

    Each file is complete or absent. The one that refuses `from_pretrained` comes first, and the one
    that the Trainer reads last.

    Args:
        model: a transformers model that holds wrappers.
        folder: made if it does not exist.
        run_state: state of the allocators, of plain values and tensors.
    Raises:
        UserError: if the folder holds another model, or the adapter cannot be saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_no_other_model(folder)
    write_json(folder / CONFIG_FILE, refused_by_from_pretrained())
    with _closed_units_unsaid(model):
        save_adapter(model, folder)
    _name_the_loader(folder / CONFIG)
    # Tied tensors are one tensor, which the file format refuses to hold twice.
    tensors = {key: value.clone() for key, value in trained_tensors(model).items()}
    with atomic_file(folder / TRAINED) as partial:
        save_file({**tensors, RUN_STATE: _as_bytes(run_state)}, partial, {"format": "pt"})
        partial.chmod((folder / CONFIG).stat().st_mode)


def _check_no_other_model(folder: Path) -> None:
    """Refuse a folder with the configuration of a whole model, such as the base."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return
    if not is_refused_by_from_pretrained(config):
        raise UserError(
            f"{folder} holds a whole model, which an adapter would replace; name another folder."
        )


def _name_the_loader(file: Path) -> None:
    """Let PEFT, which looks for a `peft_type`, quote the sentence."""
    config = json.loads(file.read_text(encoding="utf-8"))
    first = {"peft_type": HOW_TO_LOAD, "base_model_name_or_path": HOW_TO_LOAD}
    write_json(file, {**first, **config})


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of a state dict that belong to wrappers or to modules that train whole.

    Buffers of such a module are among them.
    """
    trained_whole = trained_ids(model)
    names: list[str] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Parameterization):
            names += [prefix + name for name in module.own_tensors()]
            continue
        whole = [
            name
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in trained_whole
        ]
        if whole:
            names += [prefix + name for name in whole]
            names += [prefix + name for name, _ in module.named_buffers(recurse=False)]
    present = model.state_dict()
    return {name: present[name].detach() for name in dict.fromkeys(names) if name in present}


def follow_trainer_files(model: nn.Module) -> None:
    """Let `model.load_state_dict` take the file of a Trainer, once.

    The axes get the stored sizes, and the frozen base keeps its weights. A state dict of the whole
    model loads as ever.
    """
    model.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]


def _before_loading(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing_keys: list[str],
    *_: Any,
) -> None:
    """Check that the file is of this model's adapter, and give the axes the stored sizes."""
    if prefix:
        return
    run_state = state_dict.pop(RUN_STATE, None)
    if run_state is not None:
        _check_names(trained_tensors(model), state_dict)
        run: TakesRunState | None = model.__dict__.get(TRAINER_WRITER)
        if run is not None:
            run.take_run_state(_from_bytes(run_state))
        # The hook below learns of the file from the list that PyTorch hands to it.
        missing_keys.append(RUN_STATE)
    fit_ranks(model, state_dict)


def _after_loading(model: nn.Module, incompatible: Any) -> None:
    """Report nothing as missing: what trains was checked, and the base stays as it is."""
    if RUN_STATE in incompatible.missing_keys:
        incompatible.missing_keys.clear()


def _check_names(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    missing, unexpected = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    for problem, names in (("has no", missing), ("has an unexpected", unexpected)):
        if names:
            raise UserError(
                f"The checkpoint {problem} {some(sorted(names), 1)}: it was saved under other "
                f"adapters or other trained modules than this model has; call adapt() as in the "
                f"run that saved it."
            )


def _as_bytes(run_state: Mapping[str, Any]) -> Tensor:
    buffer = io.BytesIO()
    torch.save(dict(run_state), buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(stored: Tensor) -> dict[str, Any]:
    buffer = io.BytesIO(stored.cpu().numpy().tobytes())
    state: dict[str, Any] = torch.load(buffer, map_location="cpu", weights_only=True)
    return state


def load_best_adapter(model: nn.Module, folder: Path) -> None:
    """Give a model in training the adapter of a checkpoint, after the Trainer has loaded its file.

    An allocator's gates multiply the tensors in the Trainer's file. Those of the checkpoint were
    others than those of the end, or are gone by then. The adapter has them multiplied in.
    """
    if (folder / WEIGHTS).is_file():
        for axis in rank_axes(model).values():
            axis.gate = None
        load_adapter(model, folder)


@contextmanager
def _closed_units_unsaid(model: nn.Module) -> Iterator[None]:
    """Keep `save_adapter` from naming closed units at every checkpoint; a resume needs them."""
    closed = model.__dict__.pop(CLOSED, None)
    try:
        yield
    finally:
        if closed is not None:
            model.__dict__[CLOSED] = closed
