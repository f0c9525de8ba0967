"""Collective operations over processes, which do nothing in a single one."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def several() -> bool:
    """Return whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first() -> bool:
    """Return whether this is the process that decides."""
    return not several() or dist.get_rank() == 0


def from_first(value: T) -> T:
    """Return the value of the first process."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(value: T) -> list[T]:
    """Return the values of all processes, in their order."""
    if not several():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, on each."""
    # An axis without units has nothing to send, on any process.
    if not several() or not tensor.numel():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def total(tensor: Tensor) -> tuple[Tensor, int]:
    """The sum over all processes, on each, and their number."""
    if not several():
        return tensor, 1
    result = tensor.detach().clone()
    dist.all_reduce(result)
    return result, dist.get_world_size()
