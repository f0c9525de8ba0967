"""Compose in delta space: each layer's changes at the original base become one change."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError
from adaptrank.artifacts import RoundingLoss
from adaptrank.composition.changes import (
    Change,
    Product,
    change_of,
    inner,
    shared_ranks,
    total,
    truncated,
)
from adaptrank.composition.operators import OPERATORS
from adaptrank.composition.request import Request, adapter_name
from adaptrank.composition.similarity import Similarity
from adaptrank.composition.trimming import LayerTrim
from adaptrank.composition.whole_trims import whole_trims
from adaptrank.injection import join_fused
from adaptrank.parameterizations import Parameterization, replace_layer, wrapped_layers
from adaptrank.parameterizations.lora import LoRA


def compose_in_delta_space(
    model: nn.Module, request: Request, options: Mapping[str, Any], similarity: Similarity
) -> dict[str, dict[str, Any]]:
    """Replace the loaded adapters of a model by one, layer by layer.

    Args:
        model: with the adapters loaded under `adapter_name`.
        request: the arguments of `compose`.
        options: all options of the operator, see `options_of`.
        similarity: takes the changes of each layer.
    Returns:
        {path: facts for the report}.
    """
    layers = wrapped_layers(model)
    compression = request.compression

    def all_changes() -> Iterator[tuple[str, list[Change | None]]]:
        for path, layer in layers.items():
            yield path, changes(layer, request.count)

    trims = whole_trims(request.operator, options, request.weights, all_changes)
    waiting: dict[str, Change] = {}
    with ResultWriter(model, request.merged) as writer:
        for path in list(layers):
            # No variable here holds the layer, so that its factors are freed as soon as possible.
            change, distance = _take_change(
                model, path, layers.pop(path), request, options, trims.get(path), similarity
            )
            writer.facts[path] = {"from_sum": distance}
            if path in trims:
                writer.facts[path]["kept"] = list(trims[path].kept)
            if compression.parameters is None:
                writer.put(path, change, compression.rank_of(change))
            else:
                # Ranks are chosen over all layers together.
                waiting[path] = change
        if waiting:
            ranks = shared_ranks(list(waiting.values()), int(compression.parameters or 0))
            for (path, change), rank in zip(waiting.items(), ranks, strict=True):
                writer.put(path, change, rank)
    return writer.facts


def _take_change(
    model: nn.Module,
    path: str,
    layer: Parameterization,
    request: Request,
    options: Mapping[str, Any],
    whole: LayerTrim | None,
    similarity: Similarity,
) -> tuple[Change, float]:
    """Combine the changes of one layer, and take its wrappers off."""
    layer_changes = changes(layer, request.count)
    similarity.add(path, layer_changes, weight_norm(layer))
    if whole is not None:
        options = {**options, "whole": whole}
    if any(change is not None for change in layer_changes):
        combined = _combine(layer_changes, path, request, options)
    else:
        combined = change_of(layer), 0.0  # no adapter has units here
    replace_layer(model, layer, layer.innermost)
    return combined


@torch.no_grad()
def changes(layer: Parameterization, count: int) -> list[Change | None]:
    """Return the change of each loaded adapter by itself, at the original weight.

    An adapter that does not change this layer, or has no units there, has None.
    """
    nest = layer.nest
    flags = [wrapper.enabled for wrapper in nest]
    result: list[Change | None] = []
    try:
        for position in range(count):
            of_adapter = [wrapper.name == adapter_name(position) for wrapper in nest]
            for wrapper, enabled in zip(nest, of_adapter, strict=True):
                wrapper.enabled = enabled
            acts = any(w.enabled and not w.idle for w in nest)
            result.append(change_of(layer) if acts else None)
    finally:
        for wrapper, flag in zip(nest, flags, strict=True):
            wrapper.enabled = flag
    return result


def weight_norm(layer: Parameterization) -> float:
    """Return |W| of the frozen layer."""
    return float(kinds.dense(layer.innermost, layer.adapter_dtype).norm())


def _combine(
    layer_changes: Sequence[Change | None],
    path: str,
    request: Request,
    options: Mapping[str, Any],
) -> tuple[Change, float]:
    """Return the operator's result, and its relative distance from the weighted sum."""
    present: list[Change] = []
    weights: list[float] = []
    for change, weight in zip(layer_changes, request.weights, strict=True):
        if change is not None:
            present.append(change)
            weights.append(weight)
    weighted_sum = total(present, weights)
    if request.operator == "sum":
        return weighted_sum, 0.0
    result = OPERATORS[request.operator](present, weights, path, **options)
    return result, _distance(result, weighted_sum)


def _distance(a: Change, b: Change) -> float:
    """Return |A - B| / |B|, or 0 if B is zero."""
    norm = b.norm()
    if isinstance(a, Product) and isinstance(b, Product):
        difference = math.sqrt(max(0.0, inner(a, a) - 2 * inner(a, b) + inner(b, b)))
    else:
        difference = float((a.dense() - b.dense()).double().norm())
    return difference / norm if norm else 0.0


class ResultWriter:
    """Write composed changes: as a LoRA beside each layer, or into its weight.

    If the `with` block fails, the weights are what they were.

    Args:
        model: the base, whose wrappers are taken off already.
        merged: whether changes go into the weights.
    """

    def __init__(self, model: nn.Module, merged: bool) -> None:
        self.model, self.merged = model, merged
        self.facts: dict[str, dict[str, Any]] = {}
        self._originals: list[tuple[nn.Module, Mapping[str, Tensor | None]]] = []
        self._loss = RoundingLoss()

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            for plain, values in reversed(self._originals):
                kinds.write(plain, values)
            return
        if self.merged:
            join_fused(self.model)
        self._loss.warn(
            "Merging lost %.0f %% of the change to rounding; compose on a float32 base to keep it."
        )

    def put(self, path: str, change: Change, rank: int | None = None) -> None:
        """Write one layer's change, truncated to a rank if one is given."""
        if rank is not None:
            change = self._compress(path, change, rank)
        plain = self.model.get_submodule(path)
        if self.merged:
            self._fold(path, plain, change)
        else:
            self._put_beside(path, plain, change)

    def _compress(self, path: str, change: Change, rank: int) -> Product:
        S = change.spectrum.S
        product = truncated(change, rank)
        norm = float(S.norm())
        self.facts[path]["error"] = float(S[rank:].norm()) / norm if norm else 0.0
        return product

    @torch.no_grad()
    def _fold(self, path: str, plain: nn.Module, change: Change) -> None:
        """Write W + D into a layer."""
        dtype = kinds.dtype(plain)
        original = kinds.dense(plain, torch.promote_types(torch.float32, dtype))
        exact = original + change.dense()
        rounded = exact.to(dtype)
        if not torch.isfinite(rounded).all():
            raise UserError(
                f"{path}: the merged weight is not finite in {dtype}; compose on a float32 base."
            )
        self._loss.add(exact, rounded, original)
        values = kinds.write(plain, {"weight": kinds.stored(plain, exact)})
        self._originals.append((plain, values))

    @torch.no_grad()
    def _put_beside(self, path: str, plain: nn.Module, change: Change) -> None:
        """Wrap a layer with a LoRA of scale 1 that has the factors of a product."""
        if not isinstance(change, Product):
            raise UserError(
                f"The result at {path} is no product of small factors; make it one with a rank, an "
                f"energy or an error, or merge it into the base."
            )
        if not (torch.isfinite(change.U).all() and torch.isfinite(change.V).all()):
            raise UserError(f"The result at {path} is not finite; look at the adapters.")
        # Every layer has rank=1 and alpha=1 as arguments, so alpha / rank is 1. The file states
        # the true rank of each layer.
        with torch.random.fork_rng(devices=[]):
            layer = LoRA(plain, rank=1, alpha=1.0)
        layer.A.data = change.V.to(layer.A).contiguous()
        layer.B.data = change.U.to(layer.B).contiguous()
        layer.requires_grad_(False)
        layer.renew()
        replace_layer(self.model, plain, layer)
        self.facts[path]["rank"] = change.rank
