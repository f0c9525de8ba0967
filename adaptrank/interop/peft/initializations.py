"""Initializations of PEFT that replace the frozen weight, and the change relative to that weight.

PiSSA, OLoRA, CorDA and LoRA-GA start from a product s B0 A0 that is not zero, and subtract it from
the frozen weight. After training the layer is W - s B0 A0 + s B A, but a file of PEFT holds A and B
only. For PiSSA (by a full singular value decomposition) and OLoRA (by a QR decomposition) the
product follows from W. For the others it follows from the adapter as it was before training.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError

Product = tuple[Tensor, Tensor]
"""(U (m, r), V (r, n)) of a product U V."""

UNCHANGED = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica", "none"})
"""Values of `init_lora_weights`, in lower case, that leave the frozen weight as it is."""

_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")
"""Beginnings of the values that subtract a product of factors from the frozen weight."""

_SMALLEST_GAP = 1e-5
"""Smallest distance, relative to the largest, at which float32 separates directions of a weight."""


def initialization(config: Mapping[str, Any]) -> str:
    """Return `init_lora_weights` of a configuration in lower case."""
    return str(config.get("init_lora_weights", True)).lower()


def check_initialization(config: Mapping[str, Any], folder: Path, has_initial: bool) -> None:
    """Refuse an adapter whose frozen weight cannot be known.

    Args:
        config: configuration of the adapter.
        folder: folder of the adapter, which errors name.
        has_initial: whether the adapter as it was before training is at hand.

    Raises:
        UserError: says what would help.
    """
    if config["peft_type"] != "LORA" or initialization(config) in UNCHANGED:
        if has_initial:
            raise UserError(
                f"{folder} was trained on the base as it is (init_lora_weights="
                f"{config.get('init_lora_weights', True)!r}); leave the initial adapter out."
            )
        return
    how = initialization(config)
    if not how.startswith(_SUBTRACTED):
        raise UserError(
            f"{folder} was trained with init_lora_weights={how!r}, on a base that differs from the "
            "original one in a way that its files do not say. Merge it in PEFT, and use the merged "
            "model."
        )
    if not has_initial and how not in _FROM_WEIGHT:
        raise UserError(
            f"{folder} was trained with init_lora_weights={how!r}, on a base without the product "
            "of the first factors, which its files do not hold. Give the adapter that PEFT saved "
            "before training as `initial`, or save it in PEFT with "
            "path_initial_model_for_weight_conversion."
        )


def subtracted_product(
    config: Mapping[str, Any], path: str, layer: nn.Module, folder: Path, rank: int, scale: float
) -> Product | None:
    """Return the product that PEFT subtracted from the frozen weight, computed from that weight.

    Args:
        config: configuration of the adapter.
        path: path of the layer, which errors name.
        layer: the frozen layer.
        folder: folder of the adapter, which errors name.
        rank: rank r of the adapter in this layer.
        scale: scale s of the adapter in this layer.

    Returns:
        (U, V) with U V = s B0 A0 in float64, or None if the weight was left as it is.

    Raises:
        UserError: if the weight does not determine the product.
    """
    if config["peft_type"] != "LORA" or initialization(config) in UNCHANGED:
        return None
    how = initialization(config)
    if layers.quantized(layer) or not isinstance(layer, layers.LINEAR):
        raise UserError(
            f"{folder} was trained with init_lora_weights={how!r}, which is converted for linear "
            f"layers that are not quantized, and {path} is none."
        )
    product = _FROM_WEIGHT[how](layer, rank, scale)
    if product is None:
        raise UserError(
            f"{folder} was trained with init_lora_weights={how!r}, and the weight of {path} does "
            f"not determine its first {rank} components: some are equal. Give the adapter that "
            "PEFT saved before training as `initial`."
        )
    return product


@torch.no_grad()
def _pissa(layer: nn.Module, rank: int, scale: float) -> Product | None:
    """Return the largest singular components of W, or None if the next one is as large."""
    W = layers.dense(layer, torch.float64)  # (m, n)
    is_tall = W.shape[0] >= W.shape[1]
    # The eigenvectors of the smaller Gram matrix are cheaper than all singular vectors, and in
    # float64 more exact than those that PEFT computed in float32.
    squares, vectors = torch.linalg.eigh(W.T @ W if is_tall else W @ W.T)
    values = squares.clamp_min(0).sqrt().flip(0)
    if rank < len(values) and values[rank - 1] - values[rank] < _SMALLEST_GAP * values[0]:
        return None
    largest = vectors.flip(1)[:, :rank]
    return (W @ largest, largest.T) if is_tall else (largest, largest.T @ W)


@torch.no_grad()
def _olora(layer: nn.Module, rank: int, scale: float) -> Product | None:
    """Return s Q_r R_r of the stored weight, or None if its first columns are dependent."""
    W = layers.dense(layer, torch.float64)
    # PEFT decomposes the weight as it is stored. A Conv1D stores (n, m).
    stored = layers.stored(layer, W)
    Q, R = torch.linalg.qr(stored[:, :rank])
    pivots = R.diagonal().abs()
    if len(pivots) < rank or pivots.min() < _SMALLEST_GAP * pivots.max():
        return None
    U, V = scale * Q, Q.T @ stored
    return (U, V) if isinstance(layer, nn.Linear) else (V.T, U.T)


_FROM_WEIGHT: Mapping[str, Callable[[nn.Module, int, float], Product | None]] = {
    "pissa": _pissa,
    "olora": _olora,
}
"""Initialization -> the function that computes its product from the frozen weight."""
