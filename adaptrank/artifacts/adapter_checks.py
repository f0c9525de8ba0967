"""Check an adapter's file against a model, before anything is wrapped or allocated."""

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError
from adaptrank.artifacts.base_weights import frozen_weights
from adaptrank.artifacts.contents import (
    adapter_names,
    describe_nest,
    matrix_shape,
    spell_nest,
    wrappers_named,
)
from adaptrank.artifacts.header import digest_of
from adaptrank.backbones import fingerprint
from adaptrank.parameterizations import PARAMETERIZATIONS, Parameterization

log = logging.getLogger("adaptrank")


def check_digest(file: Path, description: Mapping[str, Any]) -> None:
    """Refuse a file whose tensors or description were changed after it was written."""
    if "digest" not in description:
        # A file of format 1 has none.
        return
    with safe_open(file, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    if digest_of(description, tensors) != description["digest"]:
        raise UserError(
            f"{file} is not what was written: its digest is another one. Copy it again."
        )


def check_layers(
    layers: Mapping[str, nn.Module], description: Mapping[str, Any], file: Path
) -> None:
    """Refuse a file whose classes are unknown, or whose layers this model does not have.

    Args:
        layers: path -> layer or module, of the whole model.
        description: of the file.
        file: for error messages.
    """
    names = adapter_names(description)
    for entry in description["adapters"]:
        for wrapper in entry["nest"]:
            _check_class(wrapper["class"], file)
        for path, shape in entry["layers"].items():
            layer = layers.get(path)
            if layer is None:
                raise UserError(
                    f"{file} adapts {path!r}, which this model does not have; "
                    f"was it made for another base?"
                )
            if isinstance(layer, Parameterization):
                _check_nest(path, describe_nest(wrappers_named(layer, names)), entry["nest"], file)
            else:
                _check_shape(path, layer, tuple(shape), file)


def _check_class(name: str, file: Path) -> None:
    if name not in PARAMETERIZATIONS:
        raise UserError(
            f"{file} needs the parameterization {name!r}, which is not defined here; import the "
            f"module that defines it first. Known: {', '.join(PARAMETERIZATIONS)}."
        )


def _check_nest(
    path: str, present: list[dict[str, Any]], stored: list[dict[str, Any]], file: Path
) -> None:
    """Refuse a layer that already carries another nest under these names."""
    if present and json.loads(json.dumps(present)) != stored:
        raise UserError(
            f"{path} already carries {spell_nest(present)}, and {file} holds {spell_nest(stored)}; "
            f"load it under another name, load_adapter(..., name='other'), or into a model without "
            f"that adapter."
        )


def _check_shape(path: str, layer: nn.Module, stored: tuple[int, ...], file: Path) -> None:
    if isinstance(layer, kinds.Parts):
        raise UserError(
            f"{file} adapts {path} as a whole, and here it is split into "
            f"{', '.join(layer.names)}; load it into a model without adapters."
        )
    present = matrix_shape(layer)
    if present != stored:
        raise UserError(
            f"{file} was made for {path} of shape {stored}, and this model's is {present}."
        )


def check_allocations(
    layers: Mapping[str, nn.Module], description: Mapping[str, Any], file: Path
) -> None:
    """Build each nest on the meta device, once for each kind of layer and its shapes.

    Arguments that a class refuses, or that would take absurd memory, are found before anything is
    allocated.

    Args:
        layers: path -> layer or module, of the whole model.
        description: of the file.
        file: for error messages.
    """
    for entry in description["adapters"]:
        built = set()
        for path in entry["layers"]:
            layer = layers[path]
            plain = layer.innermost if isinstance(layer, Parameterization) else layer
            shapes = tuple(tuple(parameter.shape) for parameter in plain.parameters())
            if (type(plain), shapes) not in built:
                built.add((type(plain), shapes))
                _check_allocation(path, plain, entry["nest"], file)


def _check_allocation(path: str, plain: nn.Module, nest: list[dict[str, Any]], file: Path) -> None:
    """Build one nest over a layer on the meta device, and count its numbers."""
    numbers = sum(parameter.numel() for parameter in plain.parameters())
    limit = 4 * numbers + (1 << 20)
    for wrapper in nest:
        _check_counts(wrapper["init_args"], limit, wrapper["class"], file)
    if kinds.quantized(plain):
        # A quantized layer has no twin on the meta device.
        return
    wrapped = _build_on_meta(path, plain, nest, file)
    taken = 0
    for built in wrapped.nest:
        for name, tensor in built.state_dict().items():
            if not name.startswith("base."):
                taken += tensor.numel()
    if taken > limit:
        raise UserError(
            f"{file}: the adapter of {path} would take {taken:,} numbers, and the layer has "
            f"{limit // 4:,}; it is damaged, or meant to harm."
        )


def _build_on_meta(
    path: str, plain: nn.Module, nest: list[dict[str, Any]], file: Path
) -> Parameterization:
    twins = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for parameter in plain.parameters()
    }
    wrapped = copy.deepcopy(plain, twins)
    for wrapper in nest:
        method = PARAMETERIZATIONS[wrapper["class"]]
        try:
            with torch.random.fork_rng(devices=[]):
                wrapped = method(wrapped, **wrapper["init_args"])
        except Exception as error:
            # The arguments come from a file, so any exception is about the file.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{file}: {wrapper['class']} at {path} cannot be built as it says: {reason}"
            ) from None
    assert isinstance(wrapped, Parameterization)
    return wrapped


def _check_counts(value: Any, limit: int, method: str, file: Path) -> None:
    """Refuse arguments with a number far beyond the layer's own size."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_counts(item, limit, method, file)
    elif isinstance(value, int) and abs(value) > limit:
        raise UserError(
            f"{file} asks for a {method} with {value:,}, and the layer has {limit // 4:,} numbers; "
            f"it is damaged, or meant to harm."
        )


def warn_of_other_base(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Log one line if the frozen weights are not those that the adapter was trained on."""
    present = fingerprint(frozen_weights(model, description["trained_modules"]))
    base = description["base"]
    if present != base["fingerprint"]:
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        log.warning(
            "The base differs from the one this adapter was trained on (%s; fingerprint %s, "
            "here %s of %s): results will differ.",
            base.get("source") or base.get("name") or "unnamed",
            base["fingerprint"],
            present,
            name or f"a {type(model).__name__}",
        )
