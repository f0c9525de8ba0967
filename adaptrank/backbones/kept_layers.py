"""Linear layers that a quantization leaves as they are, read from a model without weights."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from adaptrank._errors import UserError
from adaptrank.backbones.quantization import Quantization
from adaptrank.backbones.vocabulary import embedding_paths

log = logging.getLogger("adaptrank")


def layers_to_keep(
    model: Any, quantization: Quantization, heads: Collection[str], trained: Collection[str]
) -> list[str]:
    """Return the paths of the linear layers that a quantization leaves as they are.

    They are the head of a language model, the heads of a task, and layers whose weight the model
    reads instead of calling the layer.

    Args:
        model: the model, whose tensors may be on the meta device.
        quantization: how the other layers are quantized.
        heads: paths of modules that are new, and train whole.
        trained: paths of other modules that train whole.
    Raises:
        UserError: if a layer that would be quantized trains whole, or none is left to quantize.
    """
    from adaptrank import layers

    kept = [*heads, *embedding_paths(model)]
    skipped = []
    quantized = 0
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, layers.LINEAR):
            continue
        if _lies_in(path, kept) or layers.is_read(module):
            skipped.append(path)
        elif quantization.is_quantizable(module):
            quantized += 1
            _check_frozen(path, trained, quantization)
    if not quantized:
        raise UserError(
            f"quantize: {quantization.kind} finds no layer to quantize in {type(model).__name__}."
            f"{quantization.advice}"
        )
    return skipped


def _check_frozen(path: str, trained: Collection[str], quantization: Quantization) -> None:
    for name in trained:
        if _lies_in(path, [name]):
            raise UserError(
                f"train_modules names {name}, and {path} is quantized to {quantization.kind}, "
                f"which cannot train whole. Leave it out of train_modules, or leave quantize out."
            )


def _lies_in(path: str, parents: Collection[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def warn_of_plain_weights(model: Any) -> None:
    """Log the weights that no quantization reaches: tensors of three or more dimensions.

    Experts of a mixture are such tensors, where one tensor holds all of them.
    """
    from adaptrank import layers

    large = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 2 and parameter.is_floating_point()
    }
    if large:
        whole = sum(map(layers.count_numbers, model.parameters()))
        log.warning(
            "Not quantized: %d tensors of three or more dimensions, %s first, %.2g %% of the "
            "parameters: they are no linear layers.",
            len(large),
            next(iter(large)),
            100 * sum(large.values()) / whole,
        )
