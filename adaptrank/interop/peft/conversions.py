"""Conversions of each method into HF PEFT's terms, and of each PEFT type into our classes.

A method that PEFT has too is registered with `to_peft`, by its class. A type of PEFT that we can
read is an entry of `READERS`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.interop.peft.initializations import Product
from adaptrank.interop.peft.keys import ALPHA_KEYS, pattern_value
from adaptrank.parameterizations import Parameterization
from adaptrank.parameterizations.dora import DoRA
from adaptrank.parameterizations.kronecker import divisor
from adaptrank.parameterizations.lokr import LoKr
from adaptrank.parameterizations.lora import LoRA
from adaptrank.parameterizations.svd import SVD

DEFAULT_ALPHA = 8
"""PEFT's own default of the numerator of the scale."""


# ---- from our classes to PEFT


@dataclass(frozen=True)
class PeftLayer:
    """One layer in PEFT's terms.

    Args:
        kind: PEFT's type of adapter, "LORA" or "LOKR".
        rank: rank r.
        alpha: numerator of the scale alpha / r.
        tensors: name in PEFT's files, without the path -> tensor.
        options: further settings. All layers of one PEFT adapter share them.
    """

    kind: str
    rank: int
    alpha: float
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain_lora(self) -> bool:
        """Whether any server that knows LoRA can load this layer."""
        return self.kind == "LORA" and not self.options

    @property
    def label(self) -> str:
        """Name of the method for people."""
        return "DoRA" if self.options.get("use_dora") else self.kind


@singledispatch
def to_peft(wrapper: Parameterization) -> PeftLayer | None:
    """Return PEFT's layer of the same function, or None if PEFT does not have the method.

    Register a function for a class of your own with `to_peft.register`.
    """
    return None


@to_peft.register
def _lora_to_peft(wrapper: LoRA) -> PeftLayer:
    rank = len(wrapper.A)
    tensors = {"lora_A": wrapper.A, "lora_B": wrapper.B}
    return PeftLayer("LORA", rank, wrapper.scale * rank, tensors)


@to_peft.register
def _dora_to_peft(wrapper: DoRA) -> PeftLayer:
    A, B = wrapper.A.detach(), wrapper.B.detach()
    if not len(A):
        # The magnitude acts without units, and PEFT knows no rank of 0.
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1)
    rank = len(A)
    tensors = {"lora_A": A, "lora_B": B, "lora_magnitude_vector": wrapper.m}
    return PeftLayer("LORA", rank, wrapper.scale * rank, tensors, {"use_dora": True})


@to_peft.register
def _lokr_to_peft(wrapper: LoKr) -> PeftLayer:
    m2, rank = wrapper.B1.shape
    # PEFT has one rank for both factors, and ours may differ once an allocator has changed one.
    tensors: dict[str, Tensor] = {"lokr_w1": wrapper.coarse}
    # From this rank on PEFT has the fine factor undivided.
    if 2 * rank >= max(m2, wrapper.B2.shape[1]):
        tensors["lokr_w2"] = wrapper.B1 @ wrapper.B2
    else:
        tensors |= {"lokr_w2_a": wrapper.B1, "lokr_w2_b": wrapper.B2}
    options = {"decompose_both": False, "decompose_factor": _factor_in_peft(wrapper)}
    return PeftLayer("LOKR", rank, wrapper.scale * rank, tensors, options)


def _factor_in_peft(wrapper: LoKr) -> int:
    """Return a `decompose_factor` that gives both coarse sizes of a layer in PEFT."""
    (m, n), (m1, n1) = wrapper.shape, wrapper.coarse.shape
    stated = [wrapper.factor] if isinstance(wrapper.factor, int) else []
    for factor in (*stated, -1, m1, n1):
        if (_coarse_size(m, factor), _coarse_size(n, factor)) == (m1, n1):
            return factor
    raise UserError(
        f"PEFT has no decompose_factor that makes a {m1} x {n1} factor of a {m} x {n} layer; "
        f"merge the adapter, or train with factor=-1."
    )


def _coarse_size(size: int, factor: int) -> int:
    """Return the size of the coarse factor that PEFT gives to a side of a layer.

    It is the factor, if that divides the size. Otherwise it is the smaller one of a divisor and its
    partner. The divisor is the first one from the square root on, or the largest one up to the
    factor if that comes earlier.
    """
    if factor > 0 and size % factor == 0:
        return factor
    largest = size if factor == -1 else factor
    coarse = 1
    while coarse * coarse < size:
        following = next(d for d in range(coarse + 1, size + 1) if size % d == 0)
        if following > largest:
            break
        coarse = following
    return min(coarse, size // coarse)


# ---- from PEFT to our classes


@dataclass(frozen=True)
class StoredLayer:
    """One layer of a PEFT adapter as its files have it.

    Args:
        folder: folder of the adapter, which errors name.
        config: configuration of the adapter.
        path: path of the layer in the base model.
        tensors: name in PEFT's files, without the path -> tensor.
        subtracted: function of (rank r, scale s) that returns the product s B0 A0 which PEFT
            subtracted from the frozen weight, or None if it left that weight alone.
    """

    folder: Path
    config: Mapping[str, Any]
    path: str
    tensors: Mapping[str, Tensor]
    subtracted: Callable[[int, float], Product | None] = lambda rank, scale: None

    @property
    def stated_rank(self) -> Any:
        """Rank that the configuration states for this layer."""
        return pattern_value(self.config.get("rank_pattern"), self.path, self.config["r"])

    @property
    def alpha(self) -> float:
        """Numerator of the scale that the configuration states for this layer."""
        key = ALPHA_KEYS[self.config["peft_type"]]
        default = self.config.get(key) or DEFAULT_ALPHA
        return float(pattern_value(self.config.get("alpha_pattern"), self.path, default))


@dataclass(frozen=True)
class OurLayer:
    """A wrapper that computes what a stored layer of PEFT computes.

    Args:
        method: the class with its arguments. It still lacks the layer to wrap.
        tensors: attribute of the wrapper -> its value. It may have no units, which `method` cannot
            build: the axis is emptied then.
    """

    method: "partial[Any]"
    tensors: Mapping[str, Tensor]


Reader = Callable[[StoredLayer], OurLayer]


def read_lora(stored: StoredLayer) -> OurLayer:
    """Read a layer of type LORA: LoRA, rsLoRA or DoRA."""
    A, B = _factors(stored)
    rank = len(A)
    if stored.stated_rank != rank:
        raise UserError(
            f"{stored.folder} states a rank of {stored.stated_rank} for {stored.path}, and its "
            f"tensors have {rank}."
        )
    alpha = stored.alpha
    if stored.config.get("use_rslora"):
        # A rank that an allocator changes later leaves the scale alone, so a larger alpha says the
        # same.
        alpha *= math.sqrt(rank)
    product = stored.subtracted(rank, alpha / rank)
    if product is not None:
        A, B = _relative_to_base(stored, A, B, alpha / rank, product)
        alpha, rank = alpha / rank * len(A), len(A)
    if not stored.config.get("use_dora"):
        return OurLayer(partial(LoRA, rank=rank, alpha=alpha), {"A": A, "B": B})
    magnitude = stored.tensors.get("lora_magnitude_vector")
    if magnitude is None:
        raise UserError(
            f"{stored.folder} says use_dora, and has no lora_magnitude_vector of {stored.path}."
        )
    return OurLayer(
        partial(DoRA, rank=rank, alpha=alpha), {"A": A, "B": B, "m": magnitude.flatten()}
    )


def read_adalora(stored: StoredLayer) -> OurLayer:
    """Read a layer of type ADALORA: an SVD update. PEFT divides its alpha by the remaining rank.

    A layer without a unit gets the scale that PEFT would give to one unit.
    """
    A, B = _factors(stored, may_be_empty=True)
    singular_values = stored.tensors.get("lora_E")
    if singular_values is None:
        raise UserError(f"{stored.folder} is of AdaLoRA, and has no lora_E of {stored.path}.")
    alpha = float(stored.config.get("lora_alpha") or DEFAULT_ALPHA)
    rank = max(1, len(A))
    remaining_rank = _remaining_rank(stored, rank) if len(A) else 1.0
    # PEFT adds the same small number, so that a rank of 0 divides nothing by 0.
    scale = alpha / (remaining_rank + 1e-5)
    return OurLayer(
        partial(SVD, rank=rank, alpha=scale * rank),
        {"Q": A, "P": B, "l": singular_values.flatten()},
    )


def read_lokr(stored: StoredLayer) -> OurLayer:
    """Read a layer of type LOKR. A factor that PEFT has undivided becomes a product with I."""
    rank, alpha = int(stored.stated_rank), stored.alpha
    if rank > max(tensor.numel() for tensor in stored.tensors.values()):
        raise UserError(
            f"{stored.folder} states a rank of {rank} for {stored.path}, and its tensors are "
            "smaller."
        )
    fine = stored.tensors.get("lokr_w2")
    decompose_both = "lokr_w1_a" in stored.tensors
    if fine is None:
        names = {"B1": "lokr_w2_a", "B2": "lokr_w2_b"}
        names |= {"A1": "lokr_w1_a", "A2": "lokr_w1_b"} if decompose_both else {"A": "lokr_w1"}
        tensors = {ours: _tensor(stored, theirs) for ours, theirs in names.items()}
    else:
        tensors = _undivided(stored, fine)
        alpha, rank = alpha / rank * min(fine.shape), min(fine.shape)
        decompose_both = False
    method = partial(
        LoKr,
        rank=rank,
        alpha=alpha,
        factor=_our_factor(int(stored.config.get("decompose_factor") or -1), tensors),
        decompose_both=decompose_both,
    )
    return OurLayer(method, tensors)


def _our_factor(stated: int, tensors: Mapping[str, Tensor]) -> int | list[int]:
    """Return the stated factor, or both coarse sizes if it has another meaning here."""
    left, right = (tensors[name] if name in tensors else tensors["A"] for name in ("A1", "A2"))
    coarse = (left.shape[:1].numel(), right.shape[-1:].numel())
    fine = (tensors["B1"].shape[:1].numel(), tensors["B2"].shape[-1:].numel())
    sizes = [first * second for first, second in zip(coarse, fine, strict=True)]
    if not all(sizes) or [divisor(size, stated) for size in sizes] == list(coarse):
        return stated
    return list(coarse)


def _undivided(stored: StoredLayer, fine: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a LoKr whose fine factor (m2, n2) is a product with the identity."""
    if fine.dim() != 2 or not min(fine.shape):
        raise UserError(
            f"{stored.folder}: the fine factor of {stored.path} is {tuple(fine.shape)}, which is "
            "no matrix."
        )
    identity = torch.eye(min(fine.shape), dtype=fine.dtype)
    B1, B2 = (identity, fine) if fine.shape[0] <= fine.shape[1] else (fine, identity)
    if "lokr_w1" in stored.tensors:
        return {"A": stored.tensors["lokr_w1"], "B1": B1, "B2": B2}
    A1, A2 = _tensor(stored, "lokr_w1_a"), _tensor(stored, "lokr_w1_b")
    if A1.dim() != 2 or A2.dim() != 2 or A1.shape[1] != A2.shape[0]:
        raise UserError(
            f"{stored.folder}: the factors of {stored.path} are {tuple(A1.shape)} and "
            f"{tuple(A2.shape)}, which have no product."
        )
    return {"A": A1 @ A2, "B1": B1, "B2": B2}


def _tensor(stored: StoredLayer, name: str) -> Tensor:
    if name not in stored.tensors:
        raise UserError(f"{stored.folder} has no {name} of {stored.path}.")
    return stored.tensors[name]


READERS: dict[str, Reader] = {"LORA": read_lora, "ADALORA": read_adalora, "LOKR": read_lokr}
"""PEFT's type of adapter -> the function that reads one layer of it."""


def _factors(stored: StoredLayer, may_be_empty: bool = False) -> tuple[Tensor, Tensor]:
    """Return A (r, n) and B (m, r) of a layer, with the kernels of a convolution flattened.

    Args:
        stored: the layer.
        may_be_empty: whether r may be 0.
    """
    tensors = stored.tensors
    A = tensors.get("lora_A", tensors.get("lora_embedding_A"))
    B = tensors.get("lora_B", tensors.get("lora_embedding_B"))
    if A is None or B is None:
        raise UserError(
            f"{stored.folder} has no lora_A or no lora_B of {stored.path}. It has "
            f"{', '.join(sorted(tensors))}."
        )
    are_matrices = A.dim() >= 2 and B.dim() >= 2 and (may_be_empty or len(A) > 0)
    if not are_matrices or not A.is_floating_point() or not B.is_floating_point():
        raise UserError(
            f"{stored.folder}: the factors of {stored.path} are {tuple(A.shape)} and "
            f"{tuple(B.shape)}, which are no matrices."
        )
    return A.flatten(1), B.flatten(1)


def _relative_to_base(
    stored: StoredLayer, A: Tensor, B: Tensor, scale: float, product: Product
) -> tuple[Tensor, Tensor]:
    """Return the factors of the change s B A - U V, with the same scale s."""
    U, V = product
    if A.shape[1] != V.shape[1] or B.shape[0] != U.shape[0]:
        raise UserError(
            f"{stored.folder}: the factors of {stored.path} are {tuple(A.shape)} and "
            f"{tuple(B.shape)}, for a layer of {U.shape[0]} x {V.shape[1]}."
        )
    # The factors are joined in the dtype of the product, so that nothing is rounded.
    A, B = A.to(V), B.to(U)
    return torch.cat([A, V]), torch.cat([B, -U / scale], 1)


def _remaining_rank(stored: StoredLayer, rank: int) -> float:
    """Return the number of units that AdaLoRA left in a layer.

    The tensor `ranknum` holds it. Without that tensor the pattern of the configuration says which
    units are left.
    """
    counted = stored.tensors.get("ranknum")
    if counted is not None and counted.numel() == 1:
        return float(counted)
    for key, kept in (stored.config.get("rank_pattern") or {}).items():
        if stored.path in key and isinstance(kept, list):
            return sum(map(bool, kept))
    return rank
