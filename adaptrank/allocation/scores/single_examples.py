"""Split a batch into its single examples. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def examples(batch: Any) -> Iterator[Any]:
    """Yield the single examples of a batch, each as a batch of one.

    A batch is a tensor, or mappings and sequences of tensors, whose first dimension counts
    examples. If the tensors differ in it, the examples are unknown and the whole batch is yielded.
    """
    sizes = set(_lengths(batch))
    if len(sizes) != 1:
        yield batch
        return
    for index in range(sizes.pop()):
        yield _pick(batch, index)


def _lengths(batch: Any) -> Iterator[int]:
    """Yield the first dimension of every tensor in a batch."""
    if isinstance(batch, Tensor):
        if batch.dim():
            yield len(batch)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _lengths(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _lengths(value)


def _pick(batch: Any, index: int) -> Any:
    """Return one example of a batch, with a first dimension of one."""
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _pick(value, index) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_pick(value, index) for value in batch)
    return batch
