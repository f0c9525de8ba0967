"""Load a plain backbone in 4 or 8 bits: the names, their options, and transformers' quantizers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.backbones.dtype import auto_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

FOUR_BITS = ("nf4", "fp4")
KINDS = (*FOUR_BITS, "int8", "llm-int8")
"""Names of quantizations. nf4, fp4 and llm-int8 are those of bitsandbytes, int8 is torchao's."""

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "nf4": ("bitsandbytes", "accelerate"),
    "fp4": ("bitsandbytes", "accelerate"),
    "int8": ("torchao",),
    "llm-int8": ("bitsandbytes", "accelerate"),
}
"""Quantization -> packages that transformers needs for it."""

OPTIONS = ("type", "double_quant", "compute_dtype")


@dataclass(frozen=True)
class Quantization:
    """Settings by which the linear layers of a backbone are quantized while it is loaded.

    Args:
        kind: one of `KINDS`.
        double_quant: whether the scales of 4-bit weights are quantized too, which saves 0.4 bits a
            weight.
        compute_dtype: dtype in which 4-bit weights are multiplied, by name. None is the dtype of
            the weights that are not quantized.
    """

    kind: str
    double_quant: bool = True
    compute_dtype: str | None = None

    @property
    def is_4bit(self) -> bool:
        """True if a weight takes 4 bits."""
        return self.kind in FOUR_BITS

    @property
    def bytes_per_weight(self) -> float:
        """Bytes that a quantized weight takes, with its share of the scales.

        A block of 64 weights in 4 bits has a scale of four bytes, or of one byte where scales are
        quantized. Rows of 8-bit weights have one scale, which does not count here.
        """
        if not self.is_4bit:
            return 1.0
        return 0.5 + (1 + 4 / 256 if self.double_quant else 4) / 64

    def is_quantizable(self, layer: nn.Module) -> bool:
        """Return whether a layer is of a kind that the quantizer replaces."""
        import torch

        if self.kind == "int8":
            return isinstance(layer, torch.nn.Linear)
        # bitsandbytes also turns a Conv1D of transformers into a linear layer.
        return type(layer) is torch.nn.Linear or not isinstance(layer, torch.nn.Linear)

    @property
    def advice(self) -> str:
        """Sentence, after a space, for a model without a layer of these kinds."""
        if self.kind != "int8":
            return " Leave quantize out."
        return " Its layers are of another kind than nn.Linear. Use nf4, or leave quantize out."

    def describe(self) -> dict[str, Any]:
        """Return the value of the key `quantize` that means the same, without defaults."""
        described: dict[str, Any] = {"type": self.kind}
        if not self.double_quant:
            described["double_quant"] = False
        if self.compute_dtype is not None:
            described["compute_dtype"] = self.compute_dtype
        return described


def read_quantization(given: str | Mapping[str, Any] | None) -> Quantization | None:
    """Return the quantization that a value of the key `quantize` means, or None for none.

    Args:
        given: a name, or a mapping {type: name, double_quant: bool, compute_dtype: name}.
    Raises:
        UserError: for a name, an option or a value that is unknown.
    """
    if given is None or given == "none":
        return None
    if isinstance(given, str):
        given = {"type": given}
    if not isinstance(given, Mapping) or "type" not in given:
        raise UserError(
            f"quantize={given!r} makes no sense. Give one of {', '.join(KINDS)}, or a mapping such "
            f"as {{type: nf4, double_quant: false}}."
        )
    for option in given:
        if option not in OPTIONS:
            hint = did_you_mean(str(option), OPTIONS)
            raise UserError(
                f"quantize has no option {option!r}.{hint} There are {', '.join(OPTIONS)}."
            )
    kind = given["type"]
    if kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS)
        raise UserError(f"quantize={kind!r} is unknown.{hint} Use one of {', '.join(KINDS)}.")
    quantization = Quantization(kind, given.get("double_quant", True), given.get("compute_dtype"))
    _check_options(quantization, given)
    return quantization


def _check_options(quantization: Quantization, given: Mapping[str, Any]) -> None:
    """Refuse options that the quantization does not have, or that have no such value."""
    further = [option for option in given if option != "type"]
    if further and not quantization.is_4bit:
        raise UserError(
            f"quantize: {further[0]} is an option of {' and '.join(FOUR_BITS)}, and the type is "
            f"{quantization.kind}. Leave it out."
        )
    if not isinstance(quantization.double_quant, bool):
        raise UserError(
            f"quantize: double_quant={quantization.double_quant!r} makes no sense. Give true or "
            f"false."
        )
    if quantization.compute_dtype is not None:
        _check_dtype(auto_dtype(quantization.compute_dtype), "quantize: compute_dtype")


def check_quantization(quantization: Quantization, dtype: torch.dtype) -> None:
    """Refuse a quantization whose packages are missing, or that does not go with a dtype.

    Args:
        quantization: the quantization.
        dtype: dtype of the weights that are not quantized.
    Raises:
        UserError: naming what to install, or the dtypes that fit.
    """
    _check_dtype(dtype, "dtype")
    needed = PACKAGES[quantization.kind]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"quantize: {quantization.kind} needs {' and '.join(missing)}. Type "
            f"`pip install {' '.join(missing)}`."
        )


def _check_dtype(dtype: torch.dtype, key: str) -> None:
    import torch

    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"quantize does not go with {key}={name}: scales of quantized weights are those of "
            f"fp32, bf16 or fp16. Use one of them."
        )


def quantizer_config(quantization: Quantization, dtype: torch.dtype, skipped: list[str]) -> Any:
    """Return the configuration of transformers that quantizes a model while it is loaded.

    Args:
        quantization: the quantization.
        dtype: dtype of the weights that are not quantized.
        skipped: paths of the linear layers to leave as they are.
    """
    import re

    # transformers reads a path as a regular expression from the beginning, or as an ending.
    patterns = [re.escape(path) for path in skipped]
    if quantization.kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        # By default it changes settings of the compiler and of matrix products for everybody.
        form = Int8WeightOnlyConfig(set_inductor_config=False)
        return TorchAoConfig(form, modules_to_not_convert=patterns)
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    if quantization.kind == "llm-int8":
        return make(load_in_8bit=True, llm_int8_skip_modules=patterns)
    computed = quantization.compute_dtype
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype if computed is None else auto_dtype(computed),
        llm_int8_skip_modules=patterns,
    )


def steady(model: nn.Module) -> None:
    """Let quantized layers compute the same numbers in training and in evaluation.

    On some CPUs bitsandbytes packs 4-bit weights anew at the first evaluation, rounds their scales,
    and asks for multiples of 32 outputs. Its 8-bit layers log a line for every product.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
