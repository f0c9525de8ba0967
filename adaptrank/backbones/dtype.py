"""Choose the dtype of the frozen weights by its name, or by what the processor multiplies fast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError

if TYPE_CHECKING:
    import torch


def auto_dtype(name: str) -> torch.dtype:
    """Return the dtype in which a backbone is held.

    Args:
        name: bf16, fp16, fp32 or fp64, or in full bfloat16, float16, float32, float64. "auto" is
            bfloat16 where the processor multiplies it fast (CUDA with bf16, CPU with AMX or
            AVX512 bf16), and float32 elsewhere.

    Raises:
        UserError: if the name is none of these.
    """
    import torch

    by_name = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
        "float64": torch.float64,
    }
    if name in by_name:
        return by_name[name]
    if name != "auto":
        raise UserError(
            f"The dtype {name!r} is unknown. Use 'auto' or one of {', '.join(by_name)}."
        )
    return torch.bfloat16 if _multiplies_bf16_fast() else torch.float32


def _multiplies_bf16_fast() -> bool:
    """Ask the processor that will train: a CUDA device, an Apple GPU (never), or the CPU."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available():
        return False
    return cpu_multiplies_bf16()


def cpu_multiplies_bf16() -> bool:
    """Tell whether the CPU has instructions for products in bfloat16."""
    import torch

    # `get_capabilities` is newer than the oldest PyTorch that the library accepts.
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        capabilities: Mapping[str, Any] = get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    # Only Linux has this file. Elsewhere the answer is no, which costs speed at worst.
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    flags = cpuinfo.read_text().split()
    return "amx_bf16" in flags or "avx512_bf16" in flags
