"""Save and load adapters: one safetensors file, whose header says how to build them again."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from adaptrank._collectives import first
from adaptrank._errors import RunError, UserError, some
from adaptrank._files import atomic_file
from adaptrank.artifacts.adapter_checks import (
    check_allocations,
    check_cuts,
    check_digest,
    check_layers,
    check_numbers,
    check_rows,
    check_same_layers,
    check_size,
    warn_of_other_base,
)
from adaptrank.artifacts.base_weights import trained_modules
from adaptrank.artifacts.contents import (
    adapter_names,
    adapter_tensors,
    describe_adapter,
    describe_nest,
)
from adaptrank.artifacts.conventions import record_conventions
from adaptrank.artifacts.file_names import CONFIG, WEIGHTS
from adaptrank.artifacts.header import digest_of, parse
from adaptrank.artifacts.placing import place
from adaptrank.artifacts.rollback import unchanged_on_error
from adaptrank.artifacts.saving_checks import (
    check_target,
    check_values,
    not_finite,
    warn_of_disabled,
)
from adaptrank.artifacts.stored_values import load_tensors
from adaptrank.artifacts.weights_file import StoredTensors, find_weights, open_weights
from adaptrank.axes import CLOSED, compact, fit_on_load
from adaptrank.injection import (
    ParameterizationCallable,
    check_names,
    split_at,
    wrap_targets,
)
from adaptrank.parameterizations import (
    PARAMETERIZATIONS,
    MergedUpdates,
    Parameterization,
    enclosed,
    insert_ledger,
    named_layers,
    wrapped_layers,
)

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "load_adapter",
    "load_together",
    "read_adapter",
    "save_adapter",
    "trained_modules",
    "write_described",
    "write_files",
]

log = logging.getLogger("adaptrank")

Model = TypeVar("Model", bound=nn.Module)

HEADER_KEY = "adaptrank"
"""Metadata key of the description. It is the only key, because several have no fixed order."""


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapters of a model, and the modules trained with them, to a folder.

    `adapter_model.safetensors` holds the tensors, and in its header the description that
    `read_adapter` returns. `adapter_config.json` repeats the description for people. A module that
    trained whole is written with its present values, with every adapter, and also if it was frozen
    since. Both files are complete or absent. Of several processes only the first one writes. All
    processes have to call this function, because weights may be sharded.

    Args:
        model: any module that holds wrappers. `torch.compile`, DataParallel and their like around
            it leave no trace in the file.
        folder: made if it does not exist. An adapter in it is replaced. All other files stay.
        base: facts about the frozen model, such as {"name": its id, "source": its origin}. The
            name defaults to that in the model's own configuration.
        names: names of the adapters to save. None means all.
        run: facts about the run that trained it, such as {"weights": "best", "step": 40}.
    Returns:
        The folder.
    Raises:
        ValueError: if the model holds no wrapper, or no wrapper of a name, or no values, or values
            that are not finite, or if the folder is a file or holds an adapter of another library.
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
    adapter_keys = list(tensors)
    whole = {name: t for name, t in trained_modules(model).items() if name not in tied}
    tensors |= {name: tensor.detach().contiguous() for name, tensor in whole.items()}
    if run is not None:
        description["run"] = dict(run)
    _say_closed(model)
    # A buffer of a module that trains whole may be infinite by design, such as a mask.
    trained = [name for name, tensor in whole.items() if isinstance(tensor, nn.Parameter)]
    _check_finite({key: tensors[key] for key in [*adapter_keys, *trained]})
    if first():
        write_described(folder, description, tensors)
    return folder


def write_described(
    folder: Path, description: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write an adapter from its description and its tensors, as `save_adapter` does.

    Args:
        folder: made if it does not exist.
        description: see `describe_adapter`. Its digest is set here.
        tensors: of the safetensors file.
    """
    # Readers compare the digest. They refuse a file that was cut, changed, or mixed from two.
    description["digest"] = digest_of(json.loads(json.dumps(description)), tensors)
    text = json.dumps(description, indent=2)
    write_files(folder, tensors, {HEADER_KEY: text}, text)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save tensors that are not finite, which no one can train or predict with."""
    bad = not_finite(tensors)
    if bad:
        raise RunError(
            f"{len(bad)} of {len(tensors)} tensors of this adapter are not finite "
            f"({some(bad, 2)}): nothing is saved. Go back to an earlier checkpoint, or train again "
            f"with a lower learning rate."
        )


def _say_closed(model: nn.Module) -> None:
    """Log one line if an allocator has closed units of the model that it has not removed yet."""
    closed = model.__dict__.get(CLOSED)
    if closed and first():
        log.warning(
            "This adapter is saved between two events of its allocator: %d of its units are "
            "closed, and still in the file.",
            sum(map(len, closed.values())),
        )


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
    Adapters of other names stay, and the loaded adapter is put around them. A model has one of each
    module, so a file with a trained module, such as a classifier, is refused where another adapter
    uses the module with other values. If the base has other
    weights than the adapter was trained on, the log says so in one line. Groups of the base that
    were pruned with the adapter are cut out of it. Recorded conventions of training (class names,
    stop tokens, padding) go into the model's configuration.

    Args:
        model: the base, which may hold adapters of other names. A module around it will do.
        folder: a folder that `save_adapter` wrote, or the name of one on the Hub, `user/name` or
            `user/name@revision`. The Hub's cache comes before the Hub.
        name: name of the adapter in this model. None means its name in the file.
    Returns:
        The same model.
    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if the file and the model do not fit. The model is unchanged then.
    """
    return _load(model, folder, name, together=False)


def load_together(model: Model, folder: str | os.PathLike[str], name: str | None = None) -> Model:
    """Load a file as `load_adapter` does, into a model whose adapters make one whole.

    The file may then change modules that other adapters use, and may have fewer layers than the
    model has under its name. Arguments, result and errors are those of `load_adapter`.
    """
    return _load(model, folder, name, together=True)


def _load(model: Model, folder: str | os.PathLike[str], name: str | None, together: bool) -> Model:
    """Load a file, alone or together with what the model carries."""
    file = find_weights(folder)
    with open_weights(file) as stored:
        description = _described(stored)
        stored.check()
        check_size(model, file)
        check_digest(stored, description)
        check_numbers(stored, description)
        if name is not None:
            _rename(description, name, file)
        root = place(model, description)
        with unchanged_on_error(root) as rollback:
            split_at(root, description.get("split", {}))
            layers = named_layers(root)
            _add_ledgers(layers, description)
            check_layers(layers, description, file)
            if not together:
                check_same_layers(layers, description, file)
                check_cuts(root, description, file)
            check_allocations(layers, description, file)
            check_rows(root, description, file)
            warn_of_other_base(root, description)
            for entry in description["adapters"]:
                _wrap_as_described(root, entry)
            load_tensors(root, stored, description, rollback, together)
            if pruned := description.get("pruned"):
                compact(root, pruned)
    fit_on_load(enclosed(model))
    record_conventions(root, description.get("conventions", {}), adapter_names(description))
    return model


def read_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the description in an adapter's file. No tensor is loaded.

    Args:
        folder: as in `load_adapter`.
    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if the file is damaged, or was written by another library or a later version.
    """
    with open_weights(find_weights(folder)) as stored:
        return _described(stored)


def _described(stored: StoredTensors) -> dict[str, Any]:
    """Return the description in the header of an open file, checked."""
    if HEADER_KEY not in stored.metadata:
        hint = ""
        if (stored.file.parent / CONFIG).is_file():
            hint = " An adapter of PEFT is read by `python -m adaptrank import`."
        raise UserError(
            f"{stored.file} is no adaptrank adapter: its header does not describe one.{hint}"
        )
    return parse(stored.metadata[HEADER_KEY], stored.file)


def _rename(description: Mapping[str, Any], name: str, file: Path) -> None:
    """Give all wrappers of a description another name, in place."""
    if len(stored_names := adapter_names(description)) > 1:
        raise UserError(
            f"{file} holds adapters called {some(sorted(stored_names))}; "
            f"leave `name` out to load them all."
        )
    for entry in description["adapters"]:
        for wrapper in entry["nest"]:
            wrapper["name"] = name


def _add_ledgers(layers: Mapping[str, nn.Module], description: Mapping[str, Any]) -> None:
    """Put an empty ledger under each nest that the file has with one, and the model without.

    So a run may start from the adapter that a training strategy left.
    """
    for entry in description["adapters"]:
        first, *others = entry["nest"]
        if first["class"] != MergedUpdates.__name__:
            continue
        for path in entry["layers"]:
            layer = layers.get(path)
            if isinstance(layer, Parameterization):
                present = json.loads(json.dumps(describe_nest(layer.nest)))
                if present == others:
                    insert_ledger(layer)


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
