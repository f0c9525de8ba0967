"""Put plain layers back: fold every enabled adapter into the frozen weights, in float32, with one cast at the end."""

import logging
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptrank.parameterizations.base import Parameterization, replace_layer, wrapped_layers

Model = TypeVar("Model", bound=nn.Module)

log = logging.getLogger("adaptrank")


@dataclass
class _Merged:
    """What `unmerge` needs: path -> the wrapper and the original weight."""

    layers: dict[str, tuple[Parameterization, Tensor]] = field(default_factory=dict)


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
        raise ValueError("This model is merged already, with its originals kept; unmerge() it first.")
    if not layers:
        raise ValueError("This model holds no adapter to merge.")
    _check_mergeable(model, layers)
    merged = _Merged()
    lost = changed = 0.0
    try:
        for path, layer in layers.items():
            plain = layer.innermost
            original = cast(Tensor, plain.weight)
            with torch.no_grad():
                exact = layer.dense()
                before = layer.nest[0].base_weight
                weight = exact.to(original.dtype)
                if not torch.isfinite(weight).all():
                    raise ValueError(
                        f"{path}: the merged weight is not finite in {original.dtype}; merge a float32 model."
                    )
                lost += float((weight.to(exact.dtype) - exact).square().sum())
                changed += float((exact - before).square().sum())
                weight = weight.T.contiguous() if isinstance(plain, Conv1D) else weight.contiguous()
            merged.layers[path] = (layer, original.data)
            original.data = weight
            replace_layer(model, layer, plain)
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
        raise ValueError("Nothing to unmerge: merge with keep_originals=True, or load the adapter on a fresh base.")
    _restore(model, merged)
    del model._adaptrank_merged
    return model


def _restore(model: nn.Module, merged: _Merged) -> None:
    for layer, weight in merged.layers.values():
        cast(Tensor, layer.innermost.weight).data = weight
        replace_layer(model, layer.innermost, layer)


def _check_mergeable(model: nn.Module, layers: dict[str, Parameterization]) -> None:
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(path)
    for path, layer in layers.items():
        for wrapper in layer.nest:
            if wrapper.enabled and not wrapper.mergeable:
                raise ValueError(f"{path}: {type(wrapper).__name__} has no dense form and cannot be merged.")
        shared = users.get(id(layer.innermost.weight), [])
        if len(shared) > 1:
            raise ValueError(f"{path} shares its weight with {shared[0]}, which merging would change too; exclude it.")
