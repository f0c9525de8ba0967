"""Write an adapter as one of HF PEFT, so that PEFT and servers load it."""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.artifacts import trained_modules, write_files
from adaptrank.composition.changes import Change, Dense, Product, change_of, rank_for, truncated
from adaptrank.injection import last_name
from adaptrank.interop.peft.conversions import PeftLayer, to_peft
from adaptrank.interop.peft.keys import (
    ALPHA_KEYS,
    PREFIX,
    TASKS,
    exact_pattern,
    stored_tensor,
)
from adaptrank.interop.peft.modules_to_save import whole_modules
from adaptrank.interop.peft.token_rows import token_settings, without_rows
from adaptrank.parameterizations import Parameterization, enclosed, named_layers, wrapped_layers


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base: Mapping[str, Any] | None = None,
    uniform: bool = False,
    rank: int | None = None,
    error: float | None = None,
) -> dict[str, Any]:
    """Write the adapter of a model as one of HF PEFT.

    A layer whose method PEFT has too (LoRA, DoRA, LoKr) keeps its own tensors. A layer whose change
    is a product of two factors becomes a LoRA of that product. Both are exact. Ranks and scales
    that differ from layer to layer go into `rank_pattern` and `alpha_pattern`. Any other change
    becomes the best LoRA of a stated rank or error. A layer without units is left out, as PEFT's
    LoRA knows no rank of 0. If no layer has units, each gets one unit of zeros.

    Args:
        model: any module that holds wrappers. The parts of a split fused layer are put together.
        folder: folder to write, made if need be.
        base: facts about the frozen model: {"name": ..., "auto_class": ...}.
        uniform: give all layers one rank, filled up with zeros, and a scale of 1 (alpha = r), for
            servers that know one of each. The true ranks are in the header of the weights.
        rank: rank of the LoRA that approximates a change which is no product.
        error: largest relative error of that LoRA in Frobenius norm, instead of a rank.

    Returns:
        {"type": PEFT's type, "layers": {path: {"rank", "error"}}}. Exact layers have an error of 0.

    Raises:
        UserError: if there is nothing to write, or a layer has no such form. Nothing is written
            then.
    """
    model = enclosed(model)
    wrapped = wrapped_layers(model)
    if not wrapped:
        raise UserError("This model holds no adapter to export.")
    exported = _export_layers(model, wrapped, uniform, Approximation(rank, error))
    true_ranks = {path: layer.rank for path, layer in exported.items()}
    peft_layers = {path: layer.peft for path, layer in _changing(exported).items()}
    kind = _common_kind(peft_layers.values())
    if uniform:
        peft_layers = _with_equal_ranks(peft_layers)
        config = _uniform_config(peft_layers)
    else:
        config = _pattern_config(peft_layers)

    base = base or {}
    modules = named_layers(model)
    task = TASKS.get(base.get("auto_class") or "")
    rows, row_tensors = token_settings(model, kind)
    trained = without_rows(model, trained_modules(model))
    whole = whole_modules(model, trained, peft_layers, task)
    config |= {
        **rows,
        "base_model_name_or_path": base.get("name"),
        "task_type": whole.task,
        "target_modules": _target_modules(modules, list(peft_layers)),
        "inference_mode": True,
    }
    if any(isinstance(_frozen_layer(modules[path]), Conv1D) for path in peft_layers):
        config["fan_in_fan_out"] = True
    if whole.names:
        config["modules_to_save"] = list(whole.names)

    tensors = _stored_tensors(peft_layers, modules)
    tensors |= {f"{PREFIX}{name}": value for name, value in whole.tensors.items()}
    tensors |= row_tensors
    write_files(
        Path(folder),
        {key: value.detach().contiguous().clone() for key, value in tensors.items()},
        {"format": "pt", "ranks": json.dumps(true_ranks)},
        json.dumps(config, indent=2),
    )
    facts = {path: {"rank": layer.rank, "error": layer.error} for path, layer in exported.items()}
    return {"type": kind, "layers": facts}


# ---- each layer by itself


@dataclass(frozen=True)
class Approximation:
    """Accuracy of a LoRA that replaces a change that is no product: a rank, or a relative error."""

    rank: int | None
    error: float | None


@dataclass(frozen=True)
class ExportedLayer:
    """A layer in PEFT's terms.

    Args:
        peft: the layer. It has one unit of zeros where ours has none, as PEFT has no rank of 0.
        rank: number of our units.
        error: relative error of the approximation.
        changes: whether the layer changes its frozen weight at all.
    """

    peft: PeftLayer
    rank: int
    error: float
    changes: bool = True


def _export_layers(
    model: nn.Module,
    wrapped: Mapping[str, Parameterization],
    uniform: bool,
    approximation: Approximation,
) -> dict[str, ExportedLayer]:
    """Return {path in the plain model: exported layer}. Parts of a fused layer become one layer."""
    exported: dict[str, ExportedLayer] = {}
    fused_paths = _fused_paths(model)
    for path, layer in wrapped.items():
        _check_exportable(path, layer)
        fused_path = fused_paths.get(path)
        if fused_path is None:
            exported[path] = _export_layer(layer, path, uniform, approximation)
        elif fused_path not in exported:
            change = _fused_change(model, fused_path, wrapped)
            exported[fused_path] = _as_lora(change, fused_path, approximation)
    return exported


def _changing(exported: Mapping[str, ExportedLayer]) -> Mapping[str, ExportedLayer]:
    """Return the layers that change their weight, or all if none does: PEFT needs a layer."""
    return {path: layer for path, layer in exported.items() if layer.changes} or exported


def _check_exportable(path: str, layer: Parameterization) -> None:
    """Refuse a layer that PEFT would adapt in another way, or not at all."""
    plain = layer.innermost
    if not isinstance(plain, layers.MATRICES):
        raise UserError(
            f"{type(layer).__name__} at {path} changes no single matrix, and PEFT's LoRA has "
            "no place for it. Merge it instead."
        )
    for wrapper in layer.nest:
        if wrapper.enabled and not wrapper.mergeable:
            raise UserError(
                f"{type(wrapper).__name__} at {path} is no change of a weight, and PEFT's LoRA has "
                "no place for it."
            )
    if layers.is_read(plain):
        raise UserError(
            f"{path}: nn.MultiheadAttention reads this weight instead of calling the layer, and "
            "PEFT would ignore an adapter there. Merge instead."
        )
    if layer.trained_bias() is not getattr(plain, "bias", None):
        raise UserError(
            f"{type(layer).__name__} at {path} trains a bias, and PEFT's LoRA has no place for it. "
            "Merge instead."
        )
    if isinstance(plain, nn.Conv2d) and (
        set(plain.dilation) != {1} or plain.padding_mode != "zeros"
    ):
        raise UserError(
            f"{path} is a convolution with dilation {plain.dilation} and padding mode "
            f"{plain.padding_mode!r}, which PEFT's LoRA does not follow. Merge instead."
        )


def _export_layer(
    layer: Parameterization, path: str, uniform: bool, approximation: Approximation
) -> ExportedLayer:
    """Return the layer with its own tensors if PEFT has its method, and as a LoRA otherwise."""
    enabled = [wrapper for wrapper in layer.nest if wrapper.enabled and not wrapper.idle]
    converted = None
    if len(enabled) == 1 and not enabled[0].gates:
        converted = to_peft(enabled[0])
    if converted is None or (uniform and not converted.is_plain_lora):
        return _as_lora(change_of(layer), path, approximation)
    sizes = [enabled[0].axis_size(axis) for axis in enabled[0].axes]
    return ExportedLayer(converted, converted.rank if all(sizes) else 0, 0.0)


def _as_lora(change: Change, path: str, approximation: Approximation) -> ExportedLayer:
    """Return a change as a LoRA of scale 1: exact for a product, else the best approximation."""
    error = 0.0
    if not isinstance(change, Product):
        change, error = _approximated(change, path, approximation)
    U, V = change.U, change.V
    if change.rank == 0:
        # PEFT knows no rank of 0.
        U, V = U.new_zeros(U.shape[0], 1), V.new_zeros(1, V.shape[1])
    rank = U.shape[1]
    peft = PeftLayer("LORA", rank, rank, {"lora_A": V, "lora_B": U})
    return ExportedLayer(peft, change.rank, error, changes=change.rank > 0)


def _approximated(change: Dense, path: str, approximation: Approximation) -> tuple[Product, float]:
    """Return the truncated singular value decomposition of a change, and its relative error."""
    rank = approximation.rank
    if rank is None and approximation.error is None:
        raise UserError(
            f"The change at {path} is no product of small factors, and a LoRA can only come near "
            "it: state the rank or the error of the approximation, or merge instead."
        )
    if rank is None:
        rank = rank_for(change, error=approximation.error)
    S = change.spectrum.S
    error = float(S[rank:].norm() / S.norm()) if float(S.sum()) else 0.0
    return truncated(change, rank), error


def _fused_paths(model: nn.Module) -> dict[str, str]:
    """Return {path of a part of a split layer: path of that layer}."""
    paths: dict[str, str] = {}
    for path, module in named_layers(model).items():
        if isinstance(module, layers.Parts):
            for name in module.names:
                paths[_joined_path(path, name)] = path
    return paths


def _fused_change(
    model: nn.Module, fused_path: str, wrapped: Mapping[str, Parameterization]
) -> Change:
    """Return the change of a fused layer: the changes of its parts, one below the other."""
    parts = model.get_submodule(fused_path)
    assert isinstance(parts, layers.Parts)
    changes: list[Change] = []
    for name, frozen in zip(parts.names, parts.plain, strict=True):
        layer = wrapped.get(_joined_path(fused_path, name))
        changes.append(_no_change(frozen) if layer is None else change_of(layer))
    products = [change for change in changes if isinstance(change, Product)]
    if len(products) < len(changes):
        return Dense(torch.cat([change.dense() for change in changes]))
    U: Tensor = torch.block_diag(*(p.U for p in products))  # type: ignore[no-untyped-call]
    return Product(U, torch.cat([p.V for p in products]))


def _no_change(layer: nn.Module) -> Product:
    """Return the zero change of a layer, as a product of rank 0."""
    m, n = layers.shape(layer)
    dtype = torch.promote_types(torch.float32, layers.dtype(layer))
    return Product(torch.zeros(m, 0, dtype=dtype), torch.zeros(0, n, dtype=dtype))


# ---- all layers together


def _common_kind(peft_layers: Iterable[PeftLayer]) -> str:
    """Return PEFT's type of all layers."""
    kinds = {layer.label: layer.kind for layer in peft_layers}
    if len(kinds) > 1:
        raise UserError(
            f"One PEFT adapter is of one kind, and these layers are {' and '.join(sorted(kinds))}. "
            "Export with uniform ranks, or merge."
        )
    return next(iter(kinds.values()))


def _with_equal_ranks(peft_layers: Mapping[str, PeftLayer]) -> dict[str, PeftLayer]:
    """Return LoRAs of one rank and scale 1. Scales go into B, and zeros fill up both factors."""
    widest = max(layer.rank for layer in peft_layers.values())
    filled: dict[str, PeftLayer] = {}
    for path, layer in peft_layers.items():
        missing = widest - layer.rank
        A = layer.tensors["lora_A"].detach()
        B = layer.tensors["lora_B"].detach() * (layer.alpha / layer.rank)
        tensors = {
            "lora_A": torch.cat([A, A.new_zeros(missing, A.shape[1])]),
            "lora_B": torch.cat([B, B.new_zeros(len(B), missing)], 1),
        }
        filled[path] = PeftLayer("LORA", widest, widest, tensors)
    return filled


def _uniform_config(peft_layers: Mapping[str, PeftLayer]) -> dict[str, Any]:
    """Return PEFT's settings for layers of one rank and one scale."""
    layer = next(iter(peft_layers.values()))
    return {"peft_type": layer.kind, "r": layer.rank, "lora_alpha": layer.alpha, "bias": "none"}


def _pattern_config(peft_layers: Mapping[str, PeftLayer]) -> dict[str, Any]:
    """Return PEFT's settings: the most frequent rank and alpha, and patterns for the others."""
    first = next(iter(peft_layers.values()))
    for path, layer in peft_layers.items():
        for key, value in first.options.items():
            if layer.options[key] != value:
                raise UserError(
                    f"{path} has {key}={layer.options[key]!r}, other layers {value!r}. One PEFT "
                    "adapter has one of them."
                )
    ranks = {path: int(layer.rank) for path, layer in peft_layers.items()}
    alphas = {path: float(layer.alpha) for path, layer in peft_layers.items()}
    rank, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    config: dict[str, Any] = {"peft_type": first.kind, **first.options}
    config |= {"r": rank, ALPHA_KEYS[first.kind]: alpha}
    if first.kind == "LORA":
        config["bias"] = "none"
    config["rank_pattern"] = {exact_pattern(path): r for path, r in ranks.items() if r != rank}
    config["alpha_pattern"] = {exact_pattern(path): a for path, a in alphas.items() if a != alpha}
    return config


def _stored_tensors(
    peft_layers: Mapping[str, PeftLayer], modules: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Return the tensors of all layers by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for path, layer in peft_layers.items():
        frozen = _frozen_layer(modules[path])
        for name, value in layer.tensors.items():
            key, stored = stored_tensor(path, name, value, frozen)
            tensors[key] = stored
    return tensors


def _most_frequent(values: Iterable[Any]) -> Any:
    """Return the most frequent value, and the first of those in a tie."""
    listed = list(values)
    return max(dict.fromkeys(listed), key=listed.count)


def _frozen_layer(module: nn.Module) -> nn.Module:
    """Return the layer below its wrappers. For a split layer this is one of its parts."""
    if isinstance(module, layers.Parts):
        module = module.plain[0]
    return module.innermost if isinstance(module, Parameterization) else module


def _target_modules(modules: Mapping[str, nn.Module], paths: Sequence[str]) -> list[str] | str:
    """Return names that mean just these paths: last components, whole paths, or an expression."""
    for names in ({last_name(path) for path in paths}, set(paths)):
        if {path for path in modules if _is_targeted(path, names)} == set(paths):
            return sorted(names)
    return "|".join(re.escape(path) for path in paths)


def _is_targeted(path: str, names: Collection[str]) -> bool:
    """Return whether a list of `target_modules` means a path, as PEFT reads it."""
    return path in names or any(path.endswith(f".{name}") for name in names)


def _joined_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
