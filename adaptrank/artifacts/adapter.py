"""Save and load adapters: one safetensors file, whose header says how to build them again."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adaptrank._collectives import first
from adaptrank._errors import UserError
from adaptrank._files import atomic_file
from adaptrank.artifacts.adapter_checks import (
    check_allocations,
    check_digest,
    check_layers,
    warn_of_other_base,
)
from adaptrank.artifacts.base_weights import trained_modules
from adaptrank.artifacts.contents import adapter_names, adapter_tensors, describe_adapter
from adaptrank.artifacts.conventions import record_conventions
from adaptrank.artifacts.header import digest_of, parse
from adaptrank.artifacts.placing import place
from adaptrank.artifacts.saving_checks import check_target, check_values, warn_of_disabled
from adaptrank.artifacts.stored_values import load_tensors
from adaptrank.axes import compact
from adaptrank.injection import (
    ParameterizationCallable,
    check_names,
    split_at,
    undone_on_error,
    wrap_targets,
)
from adaptrank.parameterizations import (
    PARAMETERIZATIONS,
    Parameterization,
    enclosed,
    named_layers,
    wrapped_layers,
)

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "trained_modules",
    "write_files",
]

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

HEADER_KEY = "adaptrank"
"""Metadata key of the description. It is the only key, because several have no fixed order."""


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
) -> Path:
    """Write the adapters of a model, and the modules trained with them, to a folder.

    `adapter_model.safetensors` holds the tensors, and in its header the description that
    `read_adapter` returns. `adapter_config.json` repeats the description for people. Both files are
    complete or absent. Of several processes only the first one writes. All processes have to call
    this function, because weights may be sharded.

    Args:
        model: any module that holds wrappers. `torch.compile`, DataParallel and their like around
            it leave no trace in the file.
        folder: made if it does not exist. An adapter in it is replaced. All other files stay.
        base: facts about the frozen model, such as {"name": its id, "source": its origin}. The
            name defaults to that in the model's own configuration.
        names: names of the adapters to save. None means all.
    Returns:
        The folder.
    Raises:
        ValueError: if the model holds no wrapper, or no wrapper of a name, or no values, or if the
            folder is a file or holds an adapter of another library.
        OSError: if the folder cannot be written.
    """
    model = enclosed(model)
    if not wrapped_layers(model):
        raise UserError(
            "This model holds no adapter to save; call adapt() first, or unmerge() if it is merged."
        )
    if names is not None:
        names = frozenset([names] if isinstance(names, str) else names)
        check_names(model, sorted(names))
    folder = Path(folder)
    check_target(folder, folder / WEIGHTS, folder / CONFIG, HEADER_KEY)
    check_values(model)
    warn_of_disabled(model, names)

    description = describe_adapter(model, base, names)
    # A tied tensor is written once.
    tied = description["tied"]
    tensors: dict[str, Tensor] = {}
    for entry in adapter_tensors(model, names):
        if entry.key not in tied:
            tensors[entry.key] = entry.value()
    for name, tensor in trained_modules(model).items():
        if name not in tied:
            tensors[name] = tensor.detach().contiguous()

    if not first():
        return folder
    # Readers compare the digest. They refuse a file that was cut, changed, or mixed from two.
    description["digest"] = digest_of(json.loads(json.dumps(description)), tensors)
    text = json.dumps(description, indent=2)
    write_files(folder, tensors, {HEADER_KEY: text}, text)
    return folder


def write_files(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], text: str
) -> None:
    """Write the two files of an adapter, atomically.

    Args:
        folder: made if it does not exist.
        tensors: of the safetensors file.
        metadata: header of the safetensors file.
        text: of the configuration file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / CONFIG) as config, atomic_file(folder / WEIGHTS) as weights:
        config.write_text(text + "\n", encoding="utf-8")
        save_file(dict(tensors), weights, metadata=dict(metadata))
        # safetensors writes for the owner alone. Other people may read this folder's other files.
        weights.chmod(config.stat().st_mode)


def load_adapter(model: Model, folder: str | os.PathLike[str], name: str | None = None) -> Model:
    """Wrap the layers that a file names, give them the stored ranks, and load strictly.

    A layer that already carries an adapter of that name is loaded into, if its nest is the same.
    Adapters of other names stay, and the loaded adapter is put around them. If the base has other
    weights than the adapter was trained on, the log says so in one line. Groups of the base that
    were pruned with the adapter are cut out of it. Recorded conventions of training (class names,
    stop tokens, padding) go into the model's configuration.

    Args:
        model: the base, which may hold adapters of other names. A module around it will do.
        folder: a folder that `save_adapter` wrote.
        name: name of the adapter in this model. None means its name in the file.
    Returns:
        The same model.
    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if the file and the model do not fit. The model is unchanged then.
    """
    file = _weights_file(folder)
    description = read_adapter(folder)
    if name is not None and len(stored_names := adapter_names(description)) > 1:
        raise UserError(
            f"{file} holds adapters called {', '.join(sorted(stored_names))}; "
            f"leave `name` out to load them all."
        )
    check_digest(file, description)
    if name is not None:
        _rename(description, name)
    root = place(model, description)
    with undone_on_error(root, split_at(root, description.get("split", {}))):
        layers = named_layers(root)
        check_layers(layers, description, file)
        check_allocations(layers, description, file)
        warn_of_other_base(root, description)
        for entry in description["adapters"]:
            _wrap_as_described(root, entry)
        load_tensors(root, file, description["tied"], adapter_names(description))
        if pruned := description.get("pruned"):
            compact(root, pruned)
    record_conventions(root, description.get("conventions", {}), adapter_names(description))
    return model


def read_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the description in an adapter's file. No tensor is loaded.

    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if the file is damaged, or was written by another library or a later version.
    """
    file = _weights_file(folder)
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}.") from None
    if HEADER_KEY not in metadata:
        raise UserError(f"{file} is no adaptrank adapter: its header does not describe one.")
    return parse(metadata[HEADER_KEY], file)


def _weights_file(folder: str | os.PathLike[str]) -> Path:
    """Return the safetensors file of an adapter's folder, or say what is in its place."""
    folder = Path(folder)
    file = folder / WEIGHTS
    if folder.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is a file; an adapter is a folder with {WEIGHTS} in it, unpacked."
        )
    if file.is_symlink():
        raise UserError(
            f"{file} is a symbolic link, which may lead anywhere; copy the file itself."
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"No adapter at {str(folder)!r}: it has no {WEIGHTS}.{_hint_at_other_files(folder)}"
        )
    return file


def _hint_at_other_files(folder: Path) -> str:
    if (folder / "adapter" / WEIGHTS).is_file():
        return f" Did you mean {folder / 'adapter'}?"
    files = folder.iterdir() if folder.is_dir() else ()
    pickled = [file.name for file in files if file.suffix in (".bin", ".pt", ".ckpt")]
    return f" {pickled[0]} is a pickle, which is never loaded as an adapter." if pickled else ""


def _rename(description: Mapping[str, Any], name: str) -> None:
    """Give all wrappers of a description another name, in place."""
    for entry in description["adapters"]:
        for wrapper in entry["nest"]:
            wrapper["name"] = name


def _wrap_as_described(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Wrap the layers of one described nest that do not carry its adapters yet."""
    for name, makers in _adapters_of(entry["nest"]):
        layers = named_layers(model)
        bare = [path for path in entry["layers"] if not _carries(layers[path], name)]
        if bare:
            expression = "|".join(re.escape(path) for path in bare)
            wrap_targets(model, expression, makers, name=name, split_fused=False)


def _adapters_of(
    nest: list[dict[str, Any]],
) -> Iterator[tuple[str, list[ParameterizationCallable]]]:
    """Yield name and makers of each adapter of a described nest, innermost first."""
    makers: list[ParameterizationCallable] = []
    for position, wrapper in enumerate(nest):
        makers.append(partial(PARAMETERIZATIONS[wrapper["class"]], **wrapper["init_args"]))
        is_last = position + 1 == len(nest)
        if is_last or nest[position + 1]["name"] != wrapper["name"]:
            yield wrapper["name"], makers
            makers = []


def _carries(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, Parameterization) and any(w.name == name for w in layer.nest)
