"""Tensors that a method computes from its indices, and keeps until the indices change."""

from collections.abc import Callable

import torch
from torch import Tensor


class Derived:
    """A tensor computed from an index tensor, kept until the index tensor changes.

    It is no buffer of the wrapper. So it is neither saved nor broadcast to other processes, and it
    is right after a write to the index tensor. A method's `refresh` calls `forget`, because a
    resize replaces the memory of the index tensor.
    """

    def __init__(self) -> None:
        self._index: Tensor | None = None
        self._version = -1
        self._value: Tensor | None = None

    def forget(self) -> None:
        """Compute the tensor anew when it is asked for."""
        self._value = None

    def of(self, index: Tensor, dtype: torch.dtype, compute: Callable[[], Tensor]) -> Tensor:
        """Return the tensor for an index tensor, in a dtype.

        Args:
            index: the index tensor.
            dtype: dtype of the result.
            compute: computes it.
        """
        # A compiled graph computes it where it is used. A tensor of inference has no version.
        if torch.compiler.is_compiling() or index.is_inference():
            return compute().to(dtype)
        value = self._value
        is_stale = index is not self._index or index._version != self._version
        if value is None or is_stale or value.dtype != dtype:
            with torch.inference_mode(False):
                value = compute().to(dtype)
            self._index, self._version, self._value = index, index._version, value
        return value
