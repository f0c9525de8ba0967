"""Optimizer state that follows a tensor when units are kept, added, closed or scaled."""

from collections.abc import Callable, Container, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from adaptrank.axes.block_quantized import decode, encode, number_of
from adaptrank.axes.quantized_tensors import dequantized, requantized
from adaptrank.axes.state_roles import WITHOUT_UNITS, Optimizers, Role, role_of, with_inner


@dataclass(frozen=True)
class UnitChange:
    """A change of the units of a tensor, as an optimizer is told of it.

    Args:
        removed: whether a unit was removed.
        grown: number of fresh units, which come last.
        closed: units whose slices of the tensor are zero now.
    """

    removed: bool = False
    grown: int = 0
    closed: tuple[int, ...] = ()


@runtime_checkable
class Follower(Protocol):
    """An optimizer that carries state of its own (`Role.OWN`) through a change of units."""

    def follow(self, tensor: Tensor, change: UnitChange) -> None:
        """Follow a change that the tensor has gone through. It may be told of any tensor."""


def replace_units(
    tensor: Tensor,
    dim: int,
    keep: Sequence[int],
    fresh: Tensor | None,
    optimizers: Optimizers,
    like: Sequence[Tensor] = (),
) -> None:
    """Set a tensor to its kept slices followed by the fresh ones. Optimizer state follows.

    The tensor stays the same object, because optimizers hold it and tied layers may share it. The
    gradient of a parameter is dropped.

    Args:
        tensor: parameter or buffer.
        dim: dimension that counts units.
        keep: indices of the kept slices, in their new order.
        fresh: new slices, or None.
        optimizers: optimizers that may hold state of the tensor.
        like: tensors of other axes, whose second moments a fresh slice gets if none is kept here.
    """
    index = torch.tensor(list(keep), dtype=torch.long, device=tensor.device)
    kept = tensor.detach().index_select(dim, index)
    resized = kept if fresh is None else torch.cat([kept, fresh], dim)
    if not isinstance(tensor, nn.Parameter):
        tensor.data = resized
        return

    change = _Change(tensor.shape, dim % tensor.dim(), index, fresh)
    for optimizer in with_inner(optimizers):
        state = optimizer.state.get(tensor)
        # Without any second moment to take over, the steps of the tensor are counted anew.
        if state and not _follow(optimizer, state, change, like):
            del optimizer.state[tensor]

    is_whole = set(keep) == set(range(tensor.shape[dim]))
    tensor.grad = None
    # Swap the data in two steps, through another dtype. This makes autograd forget the gradient
    # accumulator, which still expects the old shape.
    other_dtype = torch.float16 if tensor.dtype != torch.float16 else torch.float32
    tensor.data = torch.empty(0, dtype=other_dtype, device=tensor.device)
    tensor.data = resized.contiguous()
    grown = 0 if fresh is None else fresh.shape[dim]
    _tell(optimizers, tensor, UnitChange(removed=not is_whole, grown=grown))


def _tell(optimizers: Optimizers, tensor: Tensor, change: UnitChange) -> None:
    """Tell the optimizers that carry state of their own of a change."""
    for optimizer in with_inner(optimizers):
        if isinstance(optimizer, Follower):
            optimizer.follow(tensor, change)


@dataclass(frozen=True)
class _Change:
    """A change of the units of a tensor.

    Args:
        shape: shape of the tensor before.
        dim: dimension that counts units, not negative.
        index: kept slices, in their new order.
        fresh: new slices of the tensor, or None.
    """

    shape: torch.Size
    dim: int
    index: Tensor
    fresh: Tensor | None

    def apply(self, value: Tensor, role: Role, lent: float) -> Tensor:
        """Return a state after the change.

        Args:
            value: the state before.
            role: its role.
            lent: second moment of fresh units if none is kept.
        """
        dim = self._dim_in(value, role)
        if dim is None:
            return value
        kept = value.index_select(dim, self.index.to(value.device))
        if self.fresh is None:
            return kept
        if role is Role.WEIGHT_COPY:
            return torch.cat([kept, self.fresh.to(value)], dim)
        shape = list(kept.shape)
        shape[dim] = self.fresh.shape[self.dim]
        return torch.cat([kept, _neutral(kept, dim, role, lent).expand(shape)], dim)

    def _dim_in(self, value: Tensor, role: Role) -> int | None:
        """Return the dimension of a state that counts units, or None if there is none."""
        ndim = len(self.shape)
        if role is Role.ROW_MOMENT:
            return None if self.dim == ndim - 1 else self.dim
        if role is Role.COLUMN_MOMENT:
            if self.dim == ndim - 2:
                return None
            return self.dim - 1 if self.dim == ndim - 1 else self.dim
        # A stacked state has a dimension in front.
        return self.dim + value.dim() - ndim


def _neutral(kept: Tensor, dim: int, role: Role, lent: float) -> Tensor:
    """Return the state of a fresh unit, with length 1 in the dimension that counts units."""
    # Adam has one step counter for the whole tensor, so its bias correction is over for a fresh
    # unit as well. With a zero second moment such a unit would jump.
    if role is not Role.FIRST_MOMENT and kept.shape[dim] > 0:
        return kept.mean(dim, keepdim=True)
    shape = list(kept.shape)
    shape[dim] = 1
    return kept.new_full(shape, 0.0 if role is Role.FIRST_MOMENT else lent)


def _lent(optimizer: torch.optim.Optimizer, key: str, like: Sequence[Tensor]) -> float:
    """Return the mean of a state over some tensors, or else over all that the optimizer moves."""
    for tensors in (like, list(optimizer.state)):
        total, count = 0.0, 0
        for tensor in tensors:
            state = optimizer.state.get(tensor, {})
            value = state.get(key)
            # One number for a whole tensor is a count.
            if not isinstance(value, Tensor) or not value.dim() or not value.numel():
                continue
            number = number_of(state, key)
            values = dequantized(value) if number is None else decode(state, number)
            total, count = total + float(values.double().sum()), count + values.numel()
        if total:
            return total / count
    return 0.0


def _follow(
    optimizer: torch.optim.Optimizer,
    state: MutableMapping[str, Any],
    change: _Change,
    like: Sequence[Tensor],
) -> bool:
    """Let the state of one parameter follow a change. States of unknown role stay.

    Returns:
        False if a fresh unit needs a second moment and no tensor has one.
    """
    for key, value in list(state.items()):
        role = role_of(optimizer, key)
        # One number for the whole tensor has no units.
        if role in WITHOUT_UNITS or not isinstance(value, Tensor) or not value.dim():
            continue
        assert role is not None
        none_kept = change.fresh is not None and not len(change.index)
        needs_one = none_kept and role not in (Role.FIRST_MOMENT, Role.WEIGHT_COPY)
        lent = _lent(optimizer, key, like) if needs_one else 0.0
        if needs_one and not lent:
            return False
        number = number_of(state, key)
        if number is None:
            state[key] = requantized(change.apply(dequantized(value), role, lent), value)
        else:
            encode(state, number, change.apply(decode(state, number), role, lent))
    return True


def _edit(
    tensor: Tensor, optimizers: Optimizers, roles: Container[Role], edit: Callable[[Tensor], object]
) -> None:
    """Change the states of a tensor that have one of these roles, in place.

    Args:
        tensor: the parameter.
        optimizers: optimizers that may hold state of it.
        roles: roles of the states to change.
        edit: called with the values of a state. A stacked state has a dimension in front.
    """
    for optimizer in with_inner(optimizers):
        state = optimizer.state.get(tensor, {})
        for key, value in list(state.items()):
            if role_of(optimizer, key) not in roles or not isinstance(value, Tensor):
                continue
            if not value.dim():
                continue
            number = number_of(state, key)
            values = dequantized(value) if number is None else decode(state, number)
            edit(values)
            if number is not None:
                encode(state, number, values)
            elif values is not value:
                value.copy_(values)


def close_units(tensor: Tensor, dim: int, index: Tensor, optimizers: Optimizers) -> None:
    """Set first moments and weight copies of some slices to zero, where the tensor is zero now.

    Second moments stay. An optimizer with state of its own is told.
    """
    from_the_end = dim % tensor.dim() - tensor.dim()
    roles = (Role.FIRST_MOMENT, Role.WEIGHT_COPY)
    _edit(tensor, optimizers, roles, lambda state: state.index_fill_(from_the_end, index, 0))
    if any(isinstance(optimizer, Follower) for optimizer in with_inner(optimizers)):
        _tell(optimizers, tensor, UnitChange(closed=tuple(index.tolist())))


def scale_copies(tensor: Tensor, factor: Tensor, optimizers: Optimizers) -> None:
    """Multiply the weight copies of a tensor by the factor that the tensor was multiplied by."""
    _edit(tensor, optimizers, (Role.WEIGHT_COPY,), lambda copy: copy.mul_(factor.to(copy)))


def shift_copies(
    tensor: Tensor, dim: int, index: Tensor, change: Tensor, optimizers: Optimizers
) -> None:
    """Add the change of a tensor's slices to its weight copies."""
    _edit(
        tensor,
        optimizers,
        (Role.WEIGHT_COPY,),
        lambda copy: copy.index_add_(dim, index, change.to(copy)),
    )
