"""Copies from the host to a device that nobody waits for."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, where: torch.device | Tensor) -> Tensor:
    """Move a tensor from the host without waiting for the work of the device.

    A copy from memory that is not pinned would wait.

    Args:
        tensor: on the host, or anywhere.
        where: a device, or a tensor on it.
    """
    device = where.device if isinstance(where, Tensor) else where
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
