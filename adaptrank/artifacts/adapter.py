"""Save and load adapters: one safetensors file whose header says all that is needed to build them again."""

import copy
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adaptrank import layers as kinds
from adaptrank._collectives import first
from adaptrank._errors import UserError
from adaptrank.artifacts.header import FORMAT_VERSION, digest_of, parse
from adaptrank.axes import PRUNED, compact, fit_ranks, rank_axes
from adaptrank.backbones import fingerprint
from adaptrank.injection import ParameterizationCallable, adapt, split_at, undone_on_error
from adaptrank.parameterizations import (
    PARAMETERIZATIONS,
    Parameterization,
    adapter_parameters,
    named_layers,
    wrapped_layers,
    wrappers,
)

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

log = logging.getLogger("adaptrank")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
) -> Path:
    """Write the adapters of a model, and the other modules trained with them, to a folder.

    `adapter_model.safetensors` holds the tensors, and in its header the description that `read_adapter` returns;
    `adapter_config.json` repeats the description for people. Both are complete or absent, never half-written. Of several processes
    only the first one writes; all have to call it, as weights may be sharded.

    Args:
        model: any module that holds wrappers.
        folder: made if need be; an adapter that is there is replaced.
        base: what is known of the frozen model, such as {"name": its id, "source": where it came from}.
        names: of the adapters to save, of several in the model; None is all.
    Returns:
        The folder.
    Raises:
        ValueError: if the model holds no wrapper, or none of a name.
    """
    if not wrapped_layers(model):
        raise UserError(
            "This model holds no adapter to save; call adapt() first, or unmerge() if it is merged."
        )
    if names is not None:
        names = frozenset([names] if isinstance(names, str) else names)
        known = dict.fromkeys(wrapper.name for wrapper in wrappers(model))
        if unknown := sorted(names - known.keys()):
            raise UserError(f"No adapter is called {unknown[0]!r}; there are {', '.join(known)}.")
    description = describe_adapter(model, base, names)
    tensors: dict[str, Tensor] = {}
    for key, wrapper, name in _keyed(model, names):
        if (
            key not in description["tied"]
        ):  # a gate that an allocator has hung here is multiplied in
            tensor = _get(wrapper, name) if "." in name else wrapper.gated(name)
            tensors[key] = tensor.detach().contiguous()
    for name, tensor in trained_modules(model).items():
        if name not in description["tied"]:
            tensors[name] = tensor.detach().contiguous()

    folder = Path(folder)
    if not first():
        return folder
    # Readers compare it: a file that was cut, changed or put together from two is refused.
    description["digest"] = digest_of(json.loads(json.dumps(description)), tensors)
    text = json.dumps(description, indent=2)
    write_files(
        folder, tensors, {"adaptrank": text}, text
    )  # one key: of several the order would be random
    return folder


def write_files(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], text: str
) -> None:
    """Write an adapter's two files, each whole or not at all: tensors with what their header says, and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / f".{WEIGHTS}.{os.getpid()}", folder / f".{CONFIG}.{os.getpid()}"
    try:
        config.write_text(text + "\n", encoding="utf-8")
        save_file(dict(tensors), weights, metadata=dict(metadata))
        weights.chmod(
            config.stat().st_mode
        )  # readable as other files are; safetensors writes for the owner alone
        os.replace(weights, folder / WEIGHTS)
        os.replace(config, folder / CONFIG)
    finally:
        weights.unlink(missing_ok=True)
        config.unlink(missing_ok=True)


def load_adapter(model: Model, folder: str | os.PathLike[str], name: str | None = None) -> Model:
    """Wrap the layers that the file names, give them the stored ranks, and load strictly; returns the same model.

    A layer that already carries an adapter of that name is loaded into, if it is the same nest, else that is an error; adapters of
    other names stay, and the loaded one is put around them. A base with other weights than the adapter was trained on is
    reported in one line of the log. Groups of the base that were pruned with the adapter are cut out of it.

    Args:
        model: the base, which may hold adapters of other names.
        folder: what `save_adapter` wrote.
        name: what to call the adapter here; None is its name in the file.
    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if the file and the model do not fit; the model is unchanged then.
    """
    file = _weights_file(folder)
    description = read_adapter(folder)
    if name is not None and len(held := _names(description)) > 1:
        raise UserError(
            f"{file} holds adapters called {', '.join(sorted(held))}; leave `name` out to load them all."
        )
    _check_digest(file, description)
    if name is not None:
        for wrapper in (wrapper for entry in description["adapters"] for wrapper in entry["nest"]):
            wrapper["name"] = name
    with undone_on_error(model, split_at(model, description.get("split", {}))):
        _check_fits(model, description, file)
        _check_allocations(model, description, file)
        _check_fingerprint(model, description)
        for entry in description["adapters"]:
            for own, makers in _runs(entry["nest"]):
                layers = named_layers(model)
                missing = [path for path in entry["layers"] if not _carries(layers[path], own)]
                if missing:
                    wanted = "|".join(re.escape(path) for path in missing)
                    adapt(model, wanted, makers, name=own, split_fused=False)
        _load_tensors(model, file, description["tied"], _names(description))
        if pruned := description.get("pruned"):
            compact(model, pruned)
    return model


def _load_tensors(
    model: nn.Module, file: Path, tied: Mapping[str, str], names: Collection[str]
) -> None:
    """Give every axis of these adapters its stored size, and every tensor its stored value; each of both, and no other."""
    with safe_open(file, framework="pt") as stored:
        keys, keyed = set(stored.keys()), list(_keyed(model, names))
        targets = {key for key, _, _ in keyed}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        others = parameters | dict(model.named_buffers())
        extra = sorted((keys | tied.keys()) - targets)
        unknown = [key for key in extra if key not in others]
        absent = sorted(key for key in targets if key not in keys and tied.get(key) not in keys)
        for what, wrong in (("an unexpected tensor", unknown), ("no tensor", absent)):
            if wrong:
                raise UserError(
                    f"{file} does not fit this model: it has {what} {wrong[0]} ({len(wrong)} such)."
                )
        values = {key: stored.get_tensor(tied.get(key, key)) for key in [*targets, *extra]}
    _tie_as_stored(keyed, tied)
    where = {module: path for path, module in model.named_modules()}
    fit_ranks(
        model, {f"{where[w]}.{name}".removeprefix("."): values[key] for key, w, name in keyed}
    )
    tensors = {key: _get(wrapper, name) for key, wrapper, name in keyed} | {
        key: others[key] for key in extra
    }
    for key, value in values.items():
        if value.shape != tensors[key].shape:
            raise UserError(
                f"{file}: {key} is {tuple(value.shape)}, this model's is {tuple(tensors[key].shape)}."
            )
        if value.is_floating_point() != tensors[key].is_floating_point():
            raise UserError(
                f"{file}: {key} is {value.dtype}, this model's is {tensors[key].dtype}."
            )
    with torch.no_grad():
        for key, value in values.items():
            tensors[key].copy_(value)
    for key in extra:
        others[key].requires_grad_(others[key].is_floating_point() and key in parameters)
    for wrapper in wrappers(model):
        wrapper.refresh()


def _tie_as_stored(
    keyed: Iterable[tuple[str, Parameterization, str]], tied: Mapping[str, str]
) -> None:
    """Tie what was tied when the adapter was saved and nothing else: `adapt` ties by one call, and there may have been several."""
    stored: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, wrapper, name in keyed:
        path, _, last = name.rpartition(".")
        owner, tensor = wrapper.get_submodule(path), _get(wrapper, name)
        if key in tied:
            tensor = stored[tied[key]]
        elif id(tensor) in taken:
            own = tensor.detach().clone()
            tensor = (
                nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
            )
        if tensor is not _get(wrapper, name):
            setattr(owner, last, tensor)
        stored[key] = tensor
        taken.add(id(tensor))


def read_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in an adapter's file, without loading a tensor.

    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if the file is damaged, or was not written by this library, or by a later version of it.
    """
    file = _weights_file(folder)
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}.") from None
    if "adaptrank" not in metadata:
        raise UserError(f"{file} is no adaptrank adapter: its header does not describe one.")
    return parse(metadata["adaptrank"], file)


def describe_adapter(
    model: nn.Module, base: Mapping[str, Any] | None = None, names: Collection[str] | None = None
) -> dict[str, Any]:
    """All that is needed to build the adapters again, those of the given names or all, as JSON-able data."""
    entries: dict[str, dict[str, Any]] = {}
    for path, layer in wrapped_layers(model).items():
        nest = _describe_nest(_called(layer, names))
        if not nest:
            continue
        entry = entries.setdefault(json.dumps(nest, sort_keys=True), {"nest": nest, "layers": {}})
        plain = layer.innermost
        entry["layers"][path] = (
            list(kinds.shape(plain)) if isinstance(plain, kinds.MATRICES) else []
        )
    first: dict[int, str] = {}
    tied = {}
    trained = trained_modules(model)
    for key, tensor in [*_adapter_tensors(model, names), *trained.items()]:
        owner = first.setdefault(id(tensor), key)
        if owner != key:
            tied[key] = owner
    return {
        "format_version": FORMAT_VERSION,
        "base": {**(base or {}), "fingerprint": fingerprint(frozen_weights(model))},
        "adapters": list(entries.values()),
        "ranks": {
            key: len(axis)
            for key, axis in rank_axes(model).items()
            if names is None or axis.members[0][0].name in names
        },
        "trained_modules": sorted(trained),
        **({"pruned": pruned} if (pruned := model.__dict__.get(PRUNED)) else {}),
        "tied": tied,
        "split": {
            path: list(m.names)
            for path, m in named_layers(model).items()
            if isinstance(m, kinds.Parts)
            # Not what only the adapters of other names have split.
            and (
                any(_called(layer, names) for layer in wrapped_layers(m).values())
                or any(key.startswith(f"{path}.") for key in trained)
            )
        },
    }


def frozen_weights(
    model: nn.Module, trained: Collection[str] | None = None
) -> dict[str, Tensor | Callable[[], Tensor]]:
    """The base's frozen parameters by their names before anything was wrapped or split, for `fingerprint`.

    Args:
        model: any module that holds wrappers, or will.
        trained: names of parameters to leave out; by default those that train.
    """
    own = {id(p) for p in adapter_parameters(model)}
    found: dict[str, Tensor | Callable[[], Tensor]] = {}

    def add(name: str, value: Tensor | Callable[[], Tensor], trains: bool) -> None:
        if not (trains if trained is None else name in trained):
            found[name.removeprefix(".")] = value

    parts: set[nn.Module] = set()
    for path, module in named_layers(model).items():
        plain = module.innermost if isinstance(module, Parameterization) else module
        if isinstance(plain, kinds.Parts):  # listed as the layer it was
            parts |= set(plain.plain)
            trains = any(p.requires_grad for part in plain.plain for p in part.parameters())
            for name in ("weight", "bias"):
                if any(getattr(part, name) is not None for part in plain.plain):
                    add(f"{path}.{name}", partial(plain.fused, name), trains)
        elif plain not in parts:
            for name, p in plain.named_parameters(recurse=False):
                if id(p) not in own:
                    add(f"{path}.{name}", p, p.requires_grad)
    return found


def trained_modules(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train outside of any wrapper (a classifier), by name, with the buffers of their modules."""
    own = {id(p) for p in adapter_parameters(model)}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        direct = {
            n: p
            for n, p in module.named_parameters(recurse=False)
            if p.requires_grad and id(p) not in own
        }
        if direct:
            buffers = {
                n: b
                for n, b in module.named_buffers(recurse=False)
                if n not in module._non_persistent_buffers_set
            }
            found.update(
                {f"{path}.{n}".removeprefix("."): t for n, t in (direct | buffers).items()}
            )
    return found


def _called(layer: Parameterization, names: Collection[str] | None) -> list[Parameterization]:
    """The wrappers of a nest that belong to adapters of these names, innermost first; None is all."""
    return [wrapper for wrapper in layer.nest if names is None or wrapper.name in names]


def _describe_nest(nest: Iterable[Parameterization]) -> list[dict[str, Any]]:
    return [{"class": type(w).__name__, "init_args": w.init_args, "name": w.name} for w in nest]


def _names(description: Mapping[str, Any]) -> frozenset[str]:
    """Names of the adapters that a file holds."""
    return frozenset(
        wrapper["name"] for entry in description["adapters"] for wrapper in entry["nest"]
    )


def _keyed(
    model: nn.Module, names: Collection[str] | None
) -> Iterator[tuple[str, Parameterization, str]]:
    """`<path before wrapping>.<position in the nest>.<tensor>`, the wrapper and the tensor's name, of all that is saved.

    Positions count the wrappers of the given names only, so that an adapter's keys do not depend on its neighbours.
    """
    for path, layer in wrapped_layers(model).items():
        for position, wrapper in enumerate(_called(layer, names)):
            for name in wrapper.state_dict(keep_vars=True):
                if not name.startswith("base."):
                    yield f"{path}.{position}.{name}".removeprefix("."), wrapper, name


def _adapter_tensors(
    model: nn.Module, names: Collection[str] | None
) -> Iterator[tuple[str, Tensor]]:
    """Key in an adapter's file -> tensor: parameters and buffers."""
    for key, wrapper, name in _keyed(model, names):
        yield key, _get(wrapper, name)


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), last)
    return tensor


def _weights_file(folder: str | os.PathLike[str]) -> Path:
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
        pickled = [
            p.name
            for p in (folder.iterdir() if folder.is_dir() else ())
            if p.suffix in (".bin", ".pt", ".ckpt")
        ]
        nested = folder / "adapter" / WEIGHTS
        hint = f" {pickled[0]} is a pickle, which is never loaded as an adapter." if pickled else ""
        hint = f" Did you mean {folder / 'adapter'}?" if nested.is_file() else hint
        raise FileNotFoundError(f"No adapter at {str(folder)!r}: it has no {WEIGHTS}.{hint}")
    return file


def _runs(nest: list[dict[str, Any]]) -> Iterator[tuple[str, list[ParameterizationCallable]]]:
    """(name, makers) of each adapter of a nest, innermost first."""
    makers: list[ParameterizationCallable] = []
    for position, wrapper in enumerate(nest):
        makers.append(partial(PARAMETERIZATIONS[wrapper["class"]], **wrapper["init_args"]))
        if position + 1 == len(nest) or nest[position + 1]["name"] != wrapper["name"]:
            yield wrapper["name"], makers
            makers = []


def _carries(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, Parameterization) and any(w.name == name for w in layer.nest)


def _check_fits(model: nn.Module, description: dict[str, Any], file: Path) -> None:
    modules, names = named_layers(model), _names(description)
    for entry in description["adapters"]:
        for wrapper in entry["nest"]:
            if wrapper["class"] not in PARAMETERIZATIONS:
                raise UserError(
                    f"{file} needs the parameterization {wrapper['class']!r}, which is not defined here; import the module "
                    f"that defines it first. Known: {', '.join(PARAMETERIZATIONS)}."
                )
        for path, shape in entry["layers"].items():
            layer = modules.get(path)
            if layer is None:
                raise UserError(
                    f"{file} adapts {path!r}, which this model does not have; was it made for another base?"
                )
            plain = layer.innermost if isinstance(layer, Parameterization) else layer
            have_shape = kinds.shape(plain) if isinstance(plain, kinds.MATRICES) else ()
            if isinstance(layer, Parameterization):
                have = _describe_nest(_called(layer, names))
                if have and json.loads(json.dumps(have)) != entry["nest"]:
                    raise UserError(
                        f"{path} already carries {_spell(have)}, and {file} holds {_spell(entry['nest'])}; load it under "
                        f"another name, load_adapter(..., name='other'), or into a model without that adapter."
                    )
            elif isinstance(layer, kinds.Parts):
                raise UserError(
                    f"{file} adapts {path} as a whole, and here it is split into {', '.join(layer.names)}; load it into a model "
                    f"without adapters."
                )
            elif have_shape != tuple(shape):
                raise UserError(
                    f"{file} was made for {path} of shape {tuple(shape)}, and this model's is {have_shape}."
                )


def _check_digest(file: Path, description: Mapping[str, Any]) -> None:
    if "digest" not in description:
        return  # of format 1
    with safe_open(file, framework="pt") as stored:
        found = digest_of(description, {key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118
    if found != description["digest"]:
        raise UserError(
            f"{file} is not what was written: its digest is another one. Copy it again."
        )


def _check_allocations(model: nn.Module, description: Mapping[str, Any], file: Path) -> None:
    """Build each nest once for each shape on the meta device: arguments that a class refuses, or that would take absurd memory, are
    seen before anything is allocated."""
    modules, seen = named_layers(model), set()
    for number, entry in enumerate(description["adapters"]):
        for path in entry["layers"]:
            layer = modules[path]
            plain = layer.innermost if isinstance(layer, Parameterization) else layer
            sizes = tuple(tuple(p.shape) for p in plain.parameters())
            if (number, type(plain), sizes) in seen:
                continue
            seen.add((number, type(plain), sizes))
            room = 4 * sum(p.numel() for p in plain.parameters()) + (1 << 20)
            for wrapper in entry["nest"]:
                _check_counts(wrapper["init_args"], room, wrapper["class"], file)
            if kinds.quantized(plain):
                continue  # it has no twin on the meta device
            meta = {
                id(p): nn.Parameter(torch.empty_like(p, device="meta"), False)
                for p in plain.parameters()
            }
            nest = copy.deepcopy(plain, meta)
            for wrapper in entry["nest"]:
                try:
                    with torch.random.fork_rng(devices=[]):
                        nest = PARAMETERIZATIONS[wrapper["class"]](nest, **wrapper["init_args"])
                except Exception as error:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    raise UserError(
                        f"{file}: {wrapper['class']} at {path} cannot be built as it says: {reason}"
                    ) from None
            assert isinstance(nest, Parameterization)
            state = ((name, t) for wrapper in nest.nest for name, t in wrapper.state_dict().items())
            taken = sum(t.numel() for name, t in state if not name.startswith("base."))
            if taken > room:
                raise UserError(
                    f"{file}: the adapter of {path} would take {taken:,} numbers, and the layer has {room // 4:,}; it is damaged, or meant to harm."
                )


def _check_counts(value: Any, most: int, name: str, file: Path) -> None:
    """No number in the arguments of a class is beyond the layer's own size."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _check_counts(one, most, name, file)
    elif isinstance(value, int) and abs(value) > most:
        raise UserError(
            f"{file} asks for a {name} with {value:,}, and the layer has {most // 4:,} numbers; it is damaged, or meant to harm."
        )


def _spell(nest: list[dict[str, Any]]) -> str:
    return " on ".join(
        f"{w['class']}({', '.join(f'{k}={v!r}' for k, v in w['init_args'].items())})"
        + ("" if w["name"] == "default" else f" named {w['name']!r}")
        for w in reversed(nest)
    )


def _check_fingerprint(model: nn.Module, description: dict[str, Any]) -> None:
    found = fingerprint(frozen_weights(model, description["trained_modules"]))
    base = description["base"]
    if found != base["fingerprint"]:
        log.warning(
            "The base differs from the one this adapter was trained on (%s; fingerprint %s, here %s of %s): results will differ.",
            base.get("source") or base.get("name") or "unnamed",
            base["fingerprint"],
            found,
            getattr(getattr(model, "config", None), "_name_or_path", "")
            or f"a {type(model).__name__}",
        )
