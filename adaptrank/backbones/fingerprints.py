"""Identify a checkpoint by a short hash of its weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VALUES_PER_TENSOR = 1024


def fingerprint(tensors: Mapping[str, Tensor | Callable[[], Tensor]]) -> str:
    """Return a short hash of weights, {name: tensor} -> 16 hex characters.

    The hash reads each name, each shape and at most 1024 values spread over each tensor, as
    bfloat16. A model in float32 and the same model in bfloat16 therefore agree, on any device.
    The hash identifies a checkpoint. It can miss a change of one value in a large tensor.
    A quantized tensor is hashed by its dequantized values, or by its codes where only the layer
    can dequantize them.

    Args:
        tensors: name -> tensor, or name -> function that returns the tensor. A function is called
            when its tensor is read, so that only one tensor need be in memory.
    """
    import torch

    from adaptrank import layers

    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        value = tensors[name]
        tensor = value if isinstance(value, torch.Tensor) else value()
        flat = layers.readable(tensor.detach()).reshape(-1)
        # The step is odd: a multiple of the row length would read one column only.
        step = math.ceil(flat.numel() / VALUES_PER_TENSOR) | 1
        sample = flat[::step].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
