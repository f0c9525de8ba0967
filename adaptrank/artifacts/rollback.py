"""All or nothing: after an error a model is, bit by bit, what it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator["Rollback"]:
    """Give a model its structure, sizes, flags and values back if the block fails.

    Every attribute of every module comes back, and every tensor gets back its data, its gradient
    and its flag. The block has to announce tensors whose values it changes in place.
    """
    rollback = Rollback(model)
    try:
        yield rollback
    except BaseException:
        rollback.undo()
        raise


class Rollback:
    """The state of a model, for the case of an error. No value is copied unless it is announced."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {module: _ModuleState(module) for module in model.modules()}
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [_TensorState(tensor) for tensor in _unique(tensors)]
        self._values: list[tuple[Tensor, Tensor]] = []

    def __contains__(self, module: nn.Module) -> bool:
        """Return whether the model had this module at the beginning."""
        return module in self._modules

    def announce(self, tensors: Iterable[Tensor]) -> None:
        """Keep the values of tensors that are about to change in place."""
        self._values += [(tensor, tensor.detach().clone()) for tensor in _unique(tensors)]

    def undo(self) -> None:
        """Restore the model."""
        for module in self._modules.values():
            module.restore()
        for state in self._tensors:
            state.restore()
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


class _ModuleState:
    """The attributes of a module, and the entries of its tables: tensors, submodules and hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.tables: list[tuple[Any, Any]] = []
        for name, value in self.attributes.items():
            if name.startswith("_") and isinstance(value, dict | set):
                self.tables.append((value, value.copy()))

    def restore(self) -> None:
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for table, entries in self.tables:
            table.clear()
            table.update(entries)


class _TensorState:
    """Data, gradient and flag of a tensor, without a copy of any."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.data = tensor, tensor.data
        self.grad = tensor.grad if tensor.is_leaf else None
        self.requires_grad = tensor.requires_grad

    def restore(self) -> None:
        tensor, data = self.tensor, self.data
        if _is_other_data(tensor, data):
            tensor.grad = None
            if isinstance(tensor, nn.Parameter):
                # In two steps, as a resize does it, so that autograd forgets the other shape.
                other_dtype = torch.float16 if data.dtype != torch.float16 else torch.float32
                tensor.data = torch.empty(0, dtype=other_dtype, device=data.device)
            tensor.data = data
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if tensor.is_leaf and tensor.grad is not self.grad:
            tensor.grad = self.grad


def _is_other_data(tensor: Tensor, data: Tensor) -> bool:
    if tensor.shape != data.shape or tensor.dtype != data.dtype:
        return True
    try:
        return tensor.data_ptr() != data.data_ptr()
    except RuntimeError:
        # Some quantized tensors have no memory of their own, and nothing here replaces them.
        return False


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
