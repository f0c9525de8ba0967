"""Contents of an adapter's file: the keys of its tensors, and the description in its header."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adaptrank import layers as kinds
from adaptrank.artifacts.base_facts import base_facts
from adaptrank.artifacts.base_weights import (
    frozen_weights,
    quantization_of,
    trained_modules,
    weights_beside_linear_layers,
)
from adaptrank.artifacts.conventions import conventions_of
from adaptrank.artifacts.header import FORMAT_VERSION
from adaptrank.axes import PRUNED, rank_axes
from adaptrank.backbones import fingerprint
from adaptrank.parameterizations import (
    Parameterization,
    enclosed,
    named_layers,
    wrapped_layers,
)


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer of a wrapper, as it stands in a file.

    Args:
        key: `<path before wrapping>.<position in the nest>.<tensor>`.
        wrapper: the wrapper that has the tensor.
        name: name in the wrapper's state dict. It has dots for a tensor of a submodule.
    """

    key: str
    wrapper: Parameterization
    name: str

    @property
    def tensor(self) -> Tensor:
        """The present tensor."""
        tensor: Tensor = getattr(*self._place())
        return tensor

    def replace(self, tensor: Tensor) -> None:
        """Put another tensor in the place of this one."""
        owner, name = self._place()
        setattr(owner, name, tensor)

    def value(self) -> Tensor:
        """Return the tensor with the gates of an allocator multiplied in, detached."""
        tensor = self.tensor if "." in self.name else self.wrapper.gated(self.name)
        return tensor.detach().contiguous()

    def _place(self) -> tuple[nn.Module, str]:
        path, _, name = self.name.rpartition(".")
        return self.wrapper.get_submodule(path), name


def adapter_tensors(model: nn.Module, names: Collection[str] | None) -> list[StoredTensor]:
    """List all tensors of the adapters of these names. None means all adapters.

    Positions in the nest count wrappers of these names only. So the keys of an adapter do not
    depend on its neighbours.
    """
    tensors = []
    for path, layer in wrapped_layers(model).items():
        for position, wrapper in enumerate(wrappers_named(layer, names)):
            prefix = f"{path}.{position}" if path else f"{position}"
            for name in wrapper.own_tensors():
                tensors.append(StoredTensor(f"{prefix}.{name}", wrapper, name))
    return tensors


def wrappers_named(
    layer: Parameterization, names: Collection[str] | None
) -> list[Parameterization]:
    """List the wrappers of a nest that have one of these names, innermost first. None means all."""
    return [wrapper for wrapper in layer.nest if names is None or wrapper.name in names]


def describe_adapter(
    model: nn.Module,
    base: Mapping[str, Any] | None = None,
    names: Collection[str] | None = None,
    base_fingerprint: str | None = None,
) -> dict[str, Any]:
    """Describe adapters as JSON-able data from which they can be built again.

    Args:
        model: any module that holds wrappers.
        base: facts about the frozen model, such as its name. They come before what its own
            configuration states.
        names: names of the adapters. None means all.
        base_fingerprint: fingerprint of the frozen model, where it is known already.
    """
    model = enclosed(model)
    trained = trained_modules(model)
    if base_fingerprint is None:
        base_fingerprint = fingerprint(frozen_weights(model))
    described_base = {**base_facts(model), **(base or {}), "fingerprint": base_fingerprint}
    quantization = quantization_of(model)
    if quantization is not None:
        described_base["quantization"] = quantization
        described_base["fingerprint_beside_linear"] = fingerprint(
            weights_beside_linear_layers(model)
        )
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base": described_base,
        "adapters": describe_nests(model, names),
        "ranks": _describe_ranks(model, names),
        "trained_modules": sorted(trained),
    }
    pruned = model.__dict__.get(PRUNED)
    if pruned:
        description["pruned"] = pruned
    conventions = conventions_of(model, names)
    if conventions:
        description["conventions"] = conventions
    description["tied"] = _describe_ties(adapter_tensors(model, names), trained)
    description["split"] = _describe_splits(model, names, trained)
    return description


def describe_nests(model: nn.Module, names: Collection[str] | None) -> list[dict[str, Any]]:
    """List the different nests, each with the shapes of the layers that have it."""
    entries: dict[str, dict[str, Any]] = {}
    for path, layer in wrapped_layers(model).items():
        nest = describe_nest(wrappers_named(layer, names))
        if nest:
            # A user's class may have arguments that no file can hold. Saving says so.
            key = json.dumps(nest, sort_keys=True, default=repr)
            entry = entries.setdefault(key, {"nest": nest, "layers": {}})
            entry["layers"][path] = list(matrix_shape(layer.innermost))
    return list(entries.values())


def describe_nest(nest: Iterable[Parameterization]) -> list[dict[str, Any]]:
    """Return class, arguments and name of each wrapper."""
    return [
        {"class": type(wrapper).__name__, "init_args": wrapper.init_args, "name": wrapper.name}
        for wrapper in nest
    ]


def matrix_shape(plain: nn.Module) -> tuple[int, ...]:
    """Return (m, n) of a layer that is a matrix, else ()."""
    return kinds.shape(plain) if isinstance(plain, kinds.MATRICES) else ()


def _describe_ranks(model: nn.Module, names: Collection[str] | None) -> dict[str, int]:
    ranks = {}
    for key, axis in rank_axes(model).items():
        wrapper, _ = axis.members[0]
        if names is None or wrapper.name in names:
            ranks[key] = len(axis)
    return ranks


def _describe_ties(stored: list[StoredTensor], trained: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {key: earlier key of the same tensor}."""
    owners: dict[int, str] = {}
    tied = {}
    keyed = [*((entry.key, entry.tensor) for entry in stored), *trained.items()]
    for key, tensor in keyed:
        owner = owners.setdefault(id(tensor), key)
        if owner != key:
            tied[key] = owner
    return tied


def _describe_splits(
    model: nn.Module, names: Collection[str] | None, trained: Collection[str]
) -> dict[str, list[str]]:
    """Return {path: names of the parts} of the fused layers that these adapters have split."""
    splits = {}
    for path, module in named_layers(model).items():
        if not isinstance(module, kinds.Parts):
            continue
        adapted = any(wrappers_named(layer, names) for layer in wrapped_layers(module).values())
        trained_part = any(name.startswith(f"{path}.") for name in trained)
        if adapted or trained_part:
            splits[path] = list(module.names)
    return splits


def adapter_names(description: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the adapters in a description."""
    return frozenset(
        wrapper["name"] for entry in description["adapters"] for wrapper in entry["nest"]
    )


SPELLED = 3
"""Number of wrappers of a nest that a sentence shows."""


def spell_nest(nest: list[dict[str, Any]]) -> str:
    """Write a described nest for people, the outermost wrapper first."""
    outermost = [_spell_wrapper(wrapper) for wrapper in reversed(nest[-SPELLED:])]
    rest = len(nest) - SPELLED
    return " on ".join([*outermost, f"{rest} more"] if rest > 0 else outermost)


def _spell_wrapper(wrapper: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in wrapper["init_args"].items())
    named = "" if wrapper["name"] == "default" else f" named {wrapper['name']!r}"
    return f"{wrapper['class']}({arguments}){named}"
