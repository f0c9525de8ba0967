"""Find the module whose paths are those of an adapter's file."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from adaptrank.parameterizations import enclosed, named_layers


def place(model: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Return the module that a file's paths count from.

    A file may have been written from a model, from a LightningModule that holds it, or from another
    module around it, and may be loaded into any of these. Where no module fits all paths, or
    several do, the model itself is returned, and the checks of the loader say what is wrong.

    Args:
        model: the model to load into.
        description: of the file.
    """
    model = enclosed(model)
    layers = named_layers(model)
    paths = _unsplit_paths(description)
    if not paths:
        return model
    components = min(paths).split(".")
    for count in range(len(components)):
        prefix = "".join(f"{name}." for name in components[:count])
        if not all(path.startswith(prefix) for path in paths):
            break
        stripped = {path.removeprefix(prefix) for path in paths}
        fitting = _modules_with(layers, stripped)
        if len(fitting) > 1 or (fitting and count and "pruned" in description):
            break
        if fitting:
            return _hold_at(components[:count], fitting[0])
    return model


def _unsplit_paths(description: Mapping[str, Any]) -> set[str]:
    """Return the paths of the adapted layers. A part of a split layer counts as the layer."""
    whole: dict[str, str] = {}
    for path, names in description.get("split", {}).items():
        whole |= {f"{path}.{name}": path for name in names}
    paths = set()
    for entry in description["adapters"]:
        paths |= {whole.get(path, path) for path in entry["layers"]}
    return paths


def _modules_with(layers: Mapping[str, nn.Module], paths: Collection[str]) -> list[nn.Module]:
    """Return the modules of a model, itself included, in which all these paths name layers."""
    if layers.keys() >= set(paths):
        return [layers[""]]
    first = min(paths)
    holders = [path.removesuffix(f".{first}") for path in layers if path.endswith(f".{first}")]
    return [layers[path] for path in holders if named_layers(layers[path]).keys() >= set(paths)]


def _hold_at(names: Sequence[str], model: nn.Module) -> nn.Module:
    """Return a module that holds the model at the path of these names."""
    for name in reversed(names):
        holder = nn.Module()
        holder.add_module(name, model)
        model = holder
    return model
