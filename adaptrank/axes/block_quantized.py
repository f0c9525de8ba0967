"""8-bit optimizer state in blocks: codes, a table of values, and the largest value of each block.

value = table[code] * absmax[block], with blocks of 256 consecutive elements of the flattened
tensor. A block runs across units, so a state is decoded, changed and encoded again.

Source: arXiv:2110.02861; the form is that of bitsandbytes.
"""

import math
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

QUANTIZED = re.compile(r"(state|qmap|absmax)(\d)")
"""Keys of a block-quantized state: "state1" has codes, "qmap1" the table, "absmax1" the scales."""


def is_quantized(state: Mapping[str, Any], key: str) -> bool:
    """Return whether a key of a parameter's state belongs to a block-quantized tensor."""
    match = QUANTIZED.fullmatch(key)
    if match is None:
        return False
    codes = state.get(f"state{match.group(2)}")
    return isinstance(codes, Tensor) and codes.dtype == torch.uint8


def number_of(state: Mapping[str, Any], key: str) -> str | None:
    """Return the number of a key such as "state1" if it holds codes, else None."""
    match = QUANTIZED.fullmatch(key)
    is_codes = match is not None and match.group(1) == "state" and is_quantized(state, key)
    return match.group(2) if match is not None and is_codes else None


def decode(state: Mapping[str, Any], number: str) -> Tensor:
    """Return the values of a block-quantized tensor, in float32 and in its shape."""
    codes, table, scales = (state[f"{part}{number}"] for part in ("state", "qmap", "absmax"))
    values = table[codes.reshape(-1).long()]
    size = _block_size(codes.numel(), scales.numel())
    blocks = torch.arange(codes.numel(), device=codes.device) // size
    scaled: Tensor = values * scales[blocks]
    return scaled.view(codes.shape)


def encode(state: MutableMapping[str, Any], number: str, values: Tensor) -> None:
    """Replace a block-quantized tensor by other values, which may have another shape."""
    old_codes, table, scales = (state[f"{part}{number}"] for part in ("state", "qmap", "absmax"))
    size = _block_size(old_codes.numel(), scales.numel())
    flat = values.reshape(-1).float()
    count = math.ceil(flat.numel() / size)
    padded = torch.nn.functional.pad(flat, (0, count * size - flat.numel())).view(count, size)
    largest = padded.abs().amax(1)
    share = padded / torch.where(largest > 0, largest, 1)[:, None]
    codes = _nearest(table.float(), share).reshape(-1)[: flat.numel()]
    state[f"state{number}"] = codes.to(torch.uint8).view(values.shape).contiguous()
    state[f"absmax{number}"] = largest.to(scales.dtype)


def _block_size(elements: int, blocks: int) -> int:
    """Return the size of a block: a power of two, and at least 256, as one block may be short."""
    return max(256, 1 << max(0, math.ceil(math.log2(max(elements, 1) / max(blocks, 1)))))


def _nearest(table: Tensor, values: Tensor) -> Tensor:
    """Return the index of the table's nearest entry for each value."""
    ordered, order = table.sort()
    above = torch.searchsorted(ordered, values.contiguous()).clamp_(1, len(ordered) - 1)
    below = above - 1
    nearer_below = (values - ordered[below]) <= (ordered[above] - values)
    return order[torch.where(nearer_below, below, above)]
