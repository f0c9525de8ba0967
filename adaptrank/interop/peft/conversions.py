"""How each method is stated in HF PEFT's terms, and how each type of PEFT is read into our classes.

A method that PEFT has too is registered with `to_peft`, by its class. A type of PEFT that we can
read is an entry of `READERS`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.interop.peft.keys import ALPHA_KEYS, pattern_value
from adaptrank.parameterizations import Parameterization
from adaptrank.parameterizations.dora import DoRA
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
    rank = len(wrapper.A)
    tensors = {
        "lora_A": wrapper.A,
        "lora_B": wrapper.B,
        "lora_magnitude_vector": wrapper.m,
    }
    return PeftLayer("LORA", rank, wrapper.scale * rank, tensors, {"use_dora": True})


@to_peft.register
def _lokr_to_peft(wrapper: LoKr) -> PeftLayer:
    rank = wrapper.B1.shape[1]
    if wrapper.decomposed:
        coarse = {"lokr_w1_a": wrapper.A1, "lokr_w1_b": wrapper.A2}
    else:
        coarse = {"lokr_w1": wrapper.A}
    tensors = {**coarse, "lokr_w2_a": wrapper.B1, "lokr_w2_b": wrapper.B2}
    options = {"decompose_both": wrapper.decompose_both, "decompose_factor": wrapper.factor}
    return PeftLayer("LOKR", rank, wrapper.scale * rank, tensors, options)


# ---- from PEFT to our classes


@dataclass(frozen=True)
class StoredLayer:
    """One layer of a PEFT adapter as its files have it.

    Args:
        folder: folder of the adapter, which errors name.
        config: configuration of the adapter.
        path: path of the layer in the base model.
        tensors: name in PEFT's files, without the path -> tensor.
    """

    folder: Path
    config: Mapping[str, Any]
    path: str
    tensors: Mapping[str, Tensor]

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
        tensors: attribute of the wrapper -> its value.
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
    """Read a layer of type ADALORA: an SVD update. PEFT divides its alpha by the remaining rank."""
    A, B = _factors(stored)
    singular_values = stored.tensors.get("lora_E")
    if singular_values is None:
        raise UserError(f"{stored.folder} is of AdaLoRA, and has no lora_E of {stored.path}.")
    alpha = float(stored.config.get("lora_alpha") or DEFAULT_ALPHA)
    # PEFT adds the same small number, so that a rank of 0 divides nothing by 0.
    scale = alpha / (_remaining_rank(stored, len(A)) + 1e-5)
    return OurLayer(
        partial(SVD, rank=len(A), alpha=scale * len(A)),
        {"Q": A, "P": B, "l": singular_values.flatten()},
    )


def read_lokr(stored: StoredLayer) -> OurLayer:
    """Read a layer of type LOKR."""
    tensors = stored.tensors
    if "lokr_w2" in tensors:
        raise UserError(
            f"{stored.folder}: the large factor of {stored.path} is stored whole, and our LoKr has "
            "it as a product. Lower the rank in PEFT."
        )
    rank, alpha = int(stored.stated_rank), stored.alpha
    decompose_both = "lokr_w1_a" in tensors
    names = {"B1": "lokr_w2_a", "B2": "lokr_w2_b"}
    if decompose_both:
        names |= {"A1": "lokr_w1_a", "A2": "lokr_w1_b"}
    else:
        names |= {"A": "lokr_w1"}
    missing = sorted(set(names.values()) - tensors.keys())
    if missing:
        raise UserError(f"{stored.folder} has no {missing[0]} of {stored.path}.")
    if rank > max(tensor.numel() for tensor in tensors.values()):
        raise UserError(
            f"{stored.folder} states a rank of {rank} for {stored.path}, and its tensors are "
            "smaller."
        )
    method = partial(
        LoKr,
        rank=rank,
        alpha=alpha,
        factor=int(stored.config.get("decompose_factor") or -1),
        decompose_both=decompose_both,
    )
    return OurLayer(method, {ours: tensors[theirs] for ours, theirs in names.items()})


READERS: dict[str, Reader] = {"LORA": read_lora, "ADALORA": read_adalora, "LOKR": read_lokr}
"""PEFT's type of adapter -> the function that reads one layer of it."""


def _factors(stored: StoredLayer) -> tuple[Tensor, Tensor]:
    """Return A (r, n) and B (m, r) of a layer, with the kernels of a convolution flattened."""
    tensors = stored.tensors
    A = tensors.get("lora_A", tensors.get("lora_embedding_A"))
    B = tensors.get("lora_B", tensors.get("lora_embedding_B"))
    if A is None or B is None:
        raise UserError(
            f"{stored.folder} has no lora_A or no lora_B of {stored.path}. It has "
            f"{', '.join(sorted(tensors))}."
        )
    are_matrices = A.dim() >= 2 and B.dim() >= 2 and len(A) > 0
    if not are_matrices or not A.is_floating_point() or not B.is_floating_point():
        raise UserError(
            f"{stored.folder}: the factors of {stored.path} are {tuple(A.shape)} and "
            f"{tuple(B.shape)}, which are no matrices."
        )
    return A.flatten(1), B.flatten(1)


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
