"""Put plain layers back: fold every enabled adapter into the frozen weights, in float32, with one cast at the end."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError
from adaptrank.injection import join_fused
from adaptrank.parameterizations import Parameterization, replace_layer, wrapped_layers

Model = TypeVar("Model", bound=nn.Module)

log = logging.getLogger("adaptrank")


@dataclass
class _Merged:
    """What `unmerge` needs: path -> the wrapper, and the original parameters by name; the layers that were split."""

    layers: dict[str, tuple[Parameterization, dict[str, Tensor | None]]] = field(
        default_factory=dict
    )
    fused: dict[nn.Module, nn.Module] = field(default_factory=dict)


def merge(model: Model, keep_originals: bool = False) -> Model:
    """Replace every wrapper by its innermost layer with the effective weight W'; returns the same model.

    The sum is taken in float32 (float64 over a float64 base) and cast once. A weak adapter merged into bf16 can vanish in the
    rounding: where more than a fifth of the change is lost, the log says so.

    Args:
        model: any module that holds wrappers.
        keep_originals: keep wrappers and original weights, so that `unmerge` restores both bit by bit.
    Raises:
        ValueError: if there is nothing to merge, a method has no dense form, a weight is tied to another module, or a merged
            weight is not finite; the model is unchanged then.
    """
    layers = wrapped_layers(model)
    if getattr(model, "_adaptrank_merged", None) is not None:
        raise UserError(
            "This model is merged already, with its originals kept; unmerge() it first."
        )
    if not layers:
        raise UserError("This model holds no adapter to merge.")
    if "" in layers:
        raise UserError(
            "The model is itself a wrapper, and nothing holds it; merge a module that does: nn.Sequential(layer)."
        )
    _check_mergeable(model, layers)
    merged = _Merged()
    lost = changed = 0.0
    try:
        # Layers before what holds them: a module that is wrapped whole folds its change into layers of its own.
        for path, layer in sorted(layers.items(), key=lambda item: -item[0].count(".")):
            plain = layer.innermost
            with torch.no_grad():
                for name, value, before, dtype in merged_parameters(layer):
                    rounded = value.to(dtype)
                    if not torch.isfinite(rounded).all():
                        raise UserError(
                            f"{path}: the merged {name} is not finite in {dtype}; merge a float32 model."
                        )
                    lost += float((rounded.to(value.dtype) - value).square().sum())
                    changed += float((value - before).square().sum())
                merged.layers[path] = (layer, kinds.write(plain, layer.merged()))
            replace_layer(model, layer, plain)
        merged.fused = join_fused(model)
    except BaseException:
        _restore(model, merged)
        raise
    if lost > 0.04 * changed > 0:
        log.warning(
            "Merging lost %.0f %% of the adapter's change to rounding; merge into a float32 model to keep it.",
            100 * (lost / changed) ** 0.5,
        )
    if keep_originals:
        model._adaptrank_merged = merged  # type: ignore[assignment]
    return model


def unmerge(model: Model) -> Model:
    """Undo `merge(model, keep_originals=True)`: the wrappers and the original weights, bit by bit.

    Raises:
        ValueError: if the originals were not kept.
    """
    merged = getattr(model, "_adaptrank_merged", None)
    if not isinstance(merged, _Merged):
        raise UserError(
            "Nothing to unmerge: merge with keep_originals=True, or load the adapter on a fresh base."
        )
    _restore(model, merged)
    del model._adaptrank_merged
    return model


def merged_parameters(layer: Parameterization) -> Iterator[tuple[str, Tensor, Tensor, torch.dtype]]:
    """(name, merged value, frozen value, frozen dtype) of every parameter that merging writes; a missing one counts as zero."""
    frozen = dict(layer.innermost.named_parameters())
    for name, value in layer.merged().items():
        have = frozen.get(name)
        before = torch.zeros_like(value) if have is None else have.to(value.dtype)
        yield name, value, before, kinds.dtype(layer.innermost) if have is None else have.dtype


def rounding_error(model: nn.Module, dtype: torch.dtype) -> float:
    """|round(W') - W'| / |W' - W| over all adapted layers, for rounding the merged weights W' to a dtype.

    About 0.43 u |W| / |W' - W| until it nears 1, with u = 2^-8 in bf16, 2^-11 in fp16: in bf16 a change of 2e-4 of the weight is lost almost whole.
    """
    lost = changed = 0.0
    with torch.no_grad():
        for layer in wrapped_layers(model).values():
            for _, exact, before, _ in merged_parameters(layer):
                lost += float((exact.to(dtype).to(exact.dtype) - exact).double().square().sum())
                changed += float((exact - before).double().square().sum())
    return math.sqrt(lost / changed) if changed else 0.0


def _restore(model: nn.Module, merged: _Merged) -> None:
    for fused, split in merged.fused.items():
        replace_layer(model, fused, split)
    for layer, values in reversed(merged.layers.values()):
        kinds.write(layer.innermost, values)
        replace_layer(model, layer.innermost, layer)


def _check_mergeable(model: nn.Module, layers: dict[str, Parameterization]) -> None:
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append((path, module))
    for path, layer in layers.items():
        for wrapper in layer.nest:
            if wrapper.enabled and not wrapper.mergeable:
                raise UserError(
                    f"{path}: {type(wrapper).__name__} has no dense form and cannot be merged."
                )
        if kinds.quantized(layer.innermost):
            raise UserError(
                f"{path} is quantized, and rounding would eat the change; load the adapter onto the unquantized base and merge there."
            )
        using = users.get(id(getattr(layer.innermost, "weight", None)), [])
        shared = [other for other, module in using if module is not layer.innermost]
        if shared:
            raise UserError(
                f"{path} shares its weight with {shared[0]}, which merging would change too; exclude it."
            )
