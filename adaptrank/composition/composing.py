"""Compose trained adapters of one base: one adapter on that base, and a report."""

import os
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from adaptrank import layers as kinds
from adaptrank.artifacts import (
    load_together,
    locate_adapter,
    read_adapter,
    unchanged_on_error,
)
from adaptrank.composition.compression import Compression
from adaptrank.composition.delta_space import changes, compose_in_delta_space, weight_norm
from adaptrank.composition.operators import options_of
from adaptrank.composition.request import (
    Others,
    Request,
    adapter_name,
    check_described,
    check_request,
    check_wrappers,
)
from adaptrank.composition.similarity import Similarity
from adaptrank.composition.whole_modules import put_modules, restored_modules
from adaptrank.parameterizations import enclosed, wrapped_layers

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def compose(
    model: Model,
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    operator: str = "sum",
    *,
    mode: Literal["delta", "sequential"] = "delta",
    order: Sequence[int] | None = None,
    compression: Compression | None = None,
    merged: bool = False,
    others: Others = "error",
    signs: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Put several adapters on their base as one. The model is changed in place.

    In mode "delta" each adapter's change is taken at the original base, D_i = f_i(W) - W, and
    W' = W + operator(w_i, D_i). This does not depend on an order. Where all changes are products
    and the operator is the sum, the result is a LoRA of the sum of their ranks, exactly. No change
    is then formed as an (m, n) matrix. Layers that an adapter does not change count as zero there.

    In mode "sequential" W' = f_k(... f_1(W)). The adapters stay what they are, and weights make no
    sense. Where an adapter reads the weight that it changes, the order matters and has to be given:
    a LoRA D in a HyperAdapt p, q is diag(p) (W + D) diag(q). A HyperAdapt in a LoRA is
    diag(p) W diag(q) + D, which is the sum in delta space.

    Args:
        model: the base, without adapters.
        adapters: folders that `save_adapter` wrote, or names on the Hub, of adapters of one base by
            its fingerprint.
        weights: one for each adapter, negative to subtract it. None means 1 for all.
        operator: any of `OPERATORS`.
        mode: "delta" or "sequential".
        order: positions in `adapters`, innermost first, in mode "sequential".
        compression: how the result is made low-rank.
        merged: put the result into the base's weights, which any change fits, instead of a LoRA
            beside them.
        others: what happens to modules that were trained whole, such as a classifier: refuse, take
            the first adapter's, average, or leave out.
        signs: count conflicts of signs for the report, which forms (m, n) matrices.
        options: of the operator. One of them is `trim`: of each adapter's change, the largest
            entries stay of "whole", all layers together, or of each "layer". The default is the one
            of the method's release. "whole" takes three to six more passes over the layers.
    Returns:
        The report, JSON-able: `Similarity.report`, and for each layer its rank, `error` of the
        compression, and `from_sum`, the relative distance of the result from the weighted sum.
    Raises:
        ValueError: if adapters and model do not fit together, or an option is out of range. The
            model is unchanged then.
    """
    folders = [locate_adapter(folder) for folder in adapters]
    weights = [1.0] * len(folders) if weights is None else [float(w) for w in weights]
    compression = compression or Compression()
    request = Request(folders, weights, operator, mode, order, compression, merged, others)
    root = enclosed(model)
    check_request(root, request)
    options = options_of(operator, options)
    descriptions = [read_adapter(folder) for folder in folders]
    check_described(root, request, descriptions)

    similarity = Similarity(request.names, signs)
    drop = others == "drop"
    with unchanged_on_error(root), restored_modules(root, descriptions, drop):
        for position in request.sequence:
            load_together(root, folders[position], name=adapter_name(position))
        check_wrappers(root, request)
        if mode == "sequential":
            facts_by_layer = _keep_nested(root, request, similarity)
        else:
            facts_by_layer = compose_in_delta_space(root, request, options, similarity)
        if not drop:
            put_modules(root, request, descriptions)

    report = {**_describe(request, options), **similarity.report()}
    for path, facts in facts_by_layer.items():
        report["layers"][path] |= facts
    return report


def _keep_nested(
    model: nn.Module, request: Request, similarity: Similarity
) -> dict[str, dict[str, Any]]:
    """Compare the loaded adapters where they change a matrix, and call them all "default"."""
    for path, layer in wrapped_layers(model).items():
        is_matrix = isinstance(layer.innermost, kinds.MATRICES)
        if is_matrix and all(wrapper.mergeable for wrapper in layer.nest):
            similarity.add(path, changes(layer, request.count), weight_norm(layer))
    for layer in wrapped_layers(model).values():
        for wrapper in layer.nest:
            wrapper.name = "default"
    return {}


def _describe(request: Request, options: dict[str, Any]) -> dict[str, Any]:
    """Return the report's part about the request."""
    in_delta_space = request.mode == "delta"
    names = request.names
    return {
        "mode": request.mode,
        "operator": request.operator if in_delta_space else None,
        "options": options,
        "weights": request.weights if in_delta_space else None,
        "order": None if in_delta_space else [names[i] for i in request.sequence],
        "folders": [str(folder) for folder in request.folders],
    }
