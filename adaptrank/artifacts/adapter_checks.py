"""Check an adapter's file against a model, before anything is wrapped or allocated."""

import copy
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError, some
from adaptrank.artifacts.arguments import check_arguments
from adaptrank.artifacts.base_weights import (
    frozen_weights,
    quantization_of,
    weights_beside_linear_layers,
)
from adaptrank.artifacts.contents import (
    adapter_names,
    describe_nest,
    matrix_shape,
    spell_nest,
    wrappers_named,
)
from adaptrank.artifacts.header import digest_of
from adaptrank.artifacts.weights_file import StoredTensors
from adaptrank.backbones import fingerprint
from adaptrank.injection import trained_rows
from adaptrank.parameterizations import PARAMETERIZATIONS, Parameterization, wrappers

log = logging.getLogger("adaptrank")

SMALL_FILE = 1 << 28
"""Bytes that a file may have beside 16 times those of the model."""

FEW_LABELS = 1024
"""Number of labels that a file may state without a tensor of as many rows."""

NUMBERS_OF_A_LAYER = 1 << 22
"""Numbers that one wrapper may have, whatever the size of its layer."""

BYTES_OF_ALL = 1 << 29
"""Bytes that the wrappers of a file may take before they are pruned to their stored sizes, beside
16 times the size of the file."""


def check_size(model: nn.Module, file: Path) -> None:
    """Refuse a file that is far larger than the model, before its tensors are read."""
    of_model = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    size, most = file.stat().st_size, 16 * of_model + SMALL_FILE
    if size > most:
        raise UserError(
            f"{file} has {size:,} bytes, and no adapter of this model has more than {most:,}; "
            f"it is damaged, or meant to harm."
        )


def check_digest(stored: StoredTensors, description: Mapping[str, Any]) -> None:
    """Refuse a file whose tensors or description were changed after it was written."""
    # A file of format 1 has none.
    if "digest" in description and digest_of(description, stored) != description["digest"]:
        raise UserError(
            f"{stored.file} is not what was written: its digest is another one. Copy it again."
        )


def check_numbers(stored: StoredTensors, description: Mapping[str, Any]) -> None:
    """Refuse numbers in a description that no tensor of the file is large enough for.

    Every wrapper has a tensor on every layer, and a head has a row for each label.
    """
    described = sum(len(entry["nest"]) * len(entry["layers"]) for entry in description["adapters"])
    tensors = len(stored) + len(description["tied"])
    if described > tensors:
        raise UserError(
            f"{stored.file} is damaged: it describes {described:,} wrappers, and has "
            f"{tensors:,} tensors."
        )
    labels = description["base"].get("num_labels") or 0
    tied = description["tied"]
    whole = [tied.get(key, key) for key in description["trained_modules"]]
    rows = [stored.shape(key)[0] for key in whole if key in stored and stored.shape(key)]
    most = max([FEW_LABELS, *rows])
    if labels > most:
        raise UserError(
            f"{stored.file} is damaged: it states {labels:,} labels, and no tensor in it has as "
            f"many rows."
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
            plain = layer
            if isinstance(layer, Parameterization):
                _check_nest(path, describe_nest(wrappers_named(layer, names)), entry["nest"], file)
                plain = layer.innermost
            _check_shape(path, plain, tuple(shape), file)


def check_same_layers(
    layers: Mapping[str, nn.Module], description: Mapping[str, Any], file: Path
) -> None:
    """Refuse a file without a layer that carries an adapter of the same name in this model.

    The layer would keep what it has, and the adapter would be a mixture of two.
    """
    names = adapter_names(description)
    described = {path for entry in description["adapters"] for path in entry["layers"]}
    for path, layer in layers.items():
        if isinstance(layer, Parameterization) and path not in described:
            for wrapper in wrappers_named(layer, names):
                raise UserError(
                    f"{path} carries adapter {wrapper.name!r}, for which {file} has no values; "
                    f"load it under another name, load_adapter(..., name='other'), or call "
                    f"adaptrank.delete_adapter(model, {wrapper.name!r}) first."
                )


def check_cuts(model: nn.Module, description: Mapping[str, Any], file: Path) -> None:
    """Refuse a file that cuts groups out of a base which adapters of other names use."""
    names = adapter_names(description)
    others = [wrapper.name for wrapper in wrappers(model) if wrapper.name not in names]
    if others and "pruned" in description:
        raise UserError(
            f"{file} cuts heads or channels out of its base, which adapter {others[0]!r} of this "
            f"model uses whole; load it into a copy of the base."
        )


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


def check_rows(model: nn.Module, description: Mapping[str, Any], file: Path) -> None:
    """Refuse a file with trained rows of an embedding whose rows do not train in the model."""
    base = description["base"]
    stored = base.get("trained_rows", [])
    present = {tuple(rows.indices.tolist()) for rows in trained_rows(model).values()}
    if stored and present != {tuple(stored)}:
        needed = base.get("vocabulary")
        resize = f"model.resize_token_embeddings({needed}), and then " if needed else ""
        raise UserError(
            f"{file} holds rows of added tokens, for which this model has no place. The commands "
            f"and model.adapter make it. In Python, call {resize}"
            f"adaptrank.injection.train_rows(model, {some(map(str, stored), 3)})."
        )


def check_allocations(
    layers: Mapping[str, nn.Module], description: Mapping[str, Any], file: Path
) -> None:
    """Build each nest on the meta device, once for each kind of layer and its shapes.

    Arguments that a class refuses, or that would take absurd memory, are found before anything is
    allocated. An allocator may have pruned much of what the arguments ask for, but not all of it.

    Args:
        layers: path -> layer or module, of the whole model.
        description: of the file.
        file: the safetensors file, whose size bounds what all layers together may ask for.
    """
    size_of_all = 0
    for entry in description["adapters"]:
        alike: dict[Any, list[str]] = {}
        for path in entry["layers"]:
            plain = _plain(layers[path])
            shapes = tuple(tuple(parameter.shape) for parameter in plain.parameters())
            alike.setdefault((type(plain), shapes), []).append(path)
        for paths in alike.values():
            plain = _plain(layers[paths[0]])
            size_of_all += len(paths) * _allocated(paths[0], plain, entry["nest"], file)
    most = BYTES_OF_ALL + 16 * file.stat().st_size
    if size_of_all > most:
        raise UserError(
            f"{file} asks for {size_of_all:,} bytes in all its layers, and its tensors allow "
            f"{most:,}; it is damaged, or meant to harm."
        )


def _plain(layer: nn.Module) -> nn.Module:
    return layer.innermost if isinstance(layer, Parameterization) else layer


def _allocated(path: str, plain: nn.Module, nest: list[dict[str, Any]], file: Path) -> int:
    """Build one nest over a layer on the meta device, and return its number of bytes."""
    numbers = sum(parameter.numel() for parameter in plain.parameters())
    limit = 4 * numbers + NUMBERS_OF_A_LAYER
    for wrapper in nest:
        check_arguments(PARAMETERIZATIONS[wrapper["class"]], wrapper["init_args"], limit, file)
    wrapped = _build_on_meta(path, plain, nest, file)
    size = 0
    for built in wrapped.nest:
        taken = built.numbers_beside_tensors()
        tensors = [*built.own_tensors().values(), *built.buffers(recurse=False)]
        taken += sum({id(tensor): tensor.numel() for tensor in tensors}.values())
        size += taken * built.adapter_dtype.itemsize
        if taken > limit:
            raise UserError(
                f"{file} asks for {taken:,} numbers for a {type(built).__name__} at {path}, which "
                f"has {numbers:,} itself; it is damaged, or meant to harm."
            )
    return size


def _build_on_meta(
    path: str, plain: nn.Module, nest: list[dict[str, Any]], file: Path
) -> Parameterization:
    wrapped = _on_meta(plain)
    for wrapper in nest:
        method = PARAMETERIZATIONS[wrapper["class"]]
        try:
            with torch.random.fork_rng(devices=[]):
                wrapped = method(wrapped, **wrapper["init_args"])
        except Exception as error:
            # The arguments come from a file, so any exception is about the file.
            reason = str(error).splitlines()[0][:500] if str(error) else type(error).__name__
            raise UserError(
                f"{file}: {wrapper['class']} at {path} cannot be built as it says: {reason}"
            ) from None
    assert isinstance(wrapped, Parameterization)
    return wrapped


def _on_meta(plain: nn.Module) -> nn.Module:
    """Return a twin of a layer on the meta device."""
    if kinds.quantized(plain):
        m, n = kinds.shape(plain)
        return nn.Linear(n, m, device="meta", dtype=kinds.dtype(plain))
    twins = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for parameter in plain.parameters()
    }
    twin: nn.Module = copy.deepcopy(plain, twins)
    return twin


def warn_of_other_base(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Log one line if the frozen weights are not those that the adapter was trained on.

    Weights on the meta device have no values, and are not compared.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    trained = description["trained_modules"]
    present = fingerprint(frozen_weights(model, trained))
    base = description["base"]
    if present == base["fingerprint"]:
        return
    differing = _other_quantization(model, base, trained)
    if differing:
        log.warning("%s", differing)
    else:
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        log.warning(
            "The base differs from the one this adapter was trained on (%s; fingerprint %s, "
            "here %s of %s): results will differ.",
            base.get("source") or base.get("name") or "unnamed",
            base["fingerprint"],
            present,
            name or f"a {type(model).__name__}",
        )


def _other_quantization(
    model: nn.Module, base: Mapping[str, Any], trained: Collection[str]
) -> str | None:
    """Return a sentence if the base is the same model in another quantization, else None.

    What no quantization changes is compared: embeddings, norms and biases.
    """
    here, there = quantization_of(model), base.get("quantization")
    if here == there:
        return None
    source = base.get("source") or base.get("name") or "its base"
    stored = base.get("fingerprint_beside_linear")
    if stored is None:
        # An adapter of a base that was not quantized, or of an earlier version.
        return (
            f"The base differs from the one this adapter was trained on ({source}, not quantized): "
            f"here it is {_spell(here)}. Results will differ by what that rounds away, or more if "
            f"it is another model."
        )
    if stored != fingerprint(weights_beside_linear_layers(model, trained)):
        return None
    return (
        f"The base differs from the one this adapter was trained on ({source}, {_spell(there)}): "
        f"here it is {_spell(here)}. Results will differ by what a quantization rounds away."
    )


def _spell(quantization: Mapping[str, Any] | None) -> str:
    if quantization is None:
        return "not quantized"
    single = quantization.get("double_quant") is False
    suffix = " without double_quant" if single else ""
    return f"quantized to {quantization['type']}{suffix}"
