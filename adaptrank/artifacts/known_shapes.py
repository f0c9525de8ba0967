"""Results of operations on tensors without values, computed once for equal arguments.

Blocks of a model repeat the same operations on the same shapes. PyTorch finds the shape of a result
in Python, which takes most of the time of a step without values.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Layout:
    """A new tensor.

    Args:
        shape: its shape.
        stride: its strides, in numbers.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        """Return such a tensor without memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class KnownShapes:
    """Runs operations on the meta device, and remembers the layouts of their results.

    Operations that return a part of an argument, or write to one, are always run.
    """

    def __init__(self) -> None:
        self._results: dict[Hashable, tuple[Any, int]] = {}
        self._makes_new: dict[Any, bool] = {}

    def run(
        self,
        operation: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        count: Callable[..., int] | None,
    ) -> tuple[Any, int]:
        """Return the result of an operation, and how many floating-point operations it takes.

        Args:
            operation: an overload of an operator.
            args: its arguments.
            kwargs: its arguments by name.
            count: counts floating-point operations, or None for none.
        """
        key = self._key(operation, args, kwargs)
        if key is not None and key in self._results:
            layouts, flops = self._results[key]
            return _made(layouts), flops
        result = operation(*args, **kwargs)
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=result))
        if key is not None and _is_new(result, (args, kwargs)):
            self._results[key] = (_layouts(result), flops)
        return result, flops

    def _key(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hashable | None:
        """Return the operation with its arguments, or None if its result has to be computed."""
        makes_new = self._makes_new.get(operation)
        if makes_new is None:
            schema = operation._schema
            values = [*schema.arguments, *schema.returns]
            makes_new = all(value.alias_info is None for value in values)
            self._makes_new[operation] = makes_new
        if not makes_new:
            return None
        try:
            return operation, _described(args), _described(tuple(sorted(kwargs.items())))
        except TypeError:
            return None


def _described(value: Any) -> Hashable:
    """Return an argument as a value to compare.

    Raises:
        TypeError: for a tensor with values, and for what cannot be compared.
    """
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple([_described(item) for item in value])
    hash(value)
    # 1, 1.0 and True are equal, and give results of other dtypes.
    return type(value), value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _is_new(result: Any, arguments: Any) -> bool:
    """Return whether all tensors of a result have memory of their own, and no more than theirs."""
    taken = {tensor.untyped_storage()._cdata for tensor in _tensors(arguments)}
    for tensor in _tensors(result):
        storage = tensor.untyped_storage()
        alike = _layouts(tensor).make()
        if storage._cdata in taken or storage.nbytes() != alike.untyped_storage().nbytes():
            return False
        taken.add(storage._cdata)
    return True


def _layouts(result: Any) -> Any:
    """Return a result with layouts in place of its tensors."""
    if isinstance(result, Tensor):
        return _Layout(tuple(result.shape), tuple(result.stride()), result.dtype)
    if isinstance(result, tuple | list):
        layouts = [_layouts(item) for item in result]
        return layouts if isinstance(result, list) else tuple(layouts)
    return result


def _made(layouts: Any) -> Any:
    """Return a result with new tensors in place of its layouts."""
    if isinstance(layouts, _Layout):
        return layouts.make()
    if isinstance(layouts, tuple | list):
        made = [_made(item) for item in layouts]
        return made if isinstance(layouts, list) else tuple(made)
    return layouts
