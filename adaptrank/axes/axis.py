"""A rank axis: units of a layer that can be scored, gated, closed, removed and added.

All of it is derived from the one line `axes` of a parameterization. Nothing here knows a method.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.axes.optimizer_state import close_units, replace_units, scale_copies
from adaptrank.axes.slot import Slot, fresh_slices, slots_of
from adaptrank.axes.state_roles import Optimizers
from adaptrank.parameterizations import Parameterization

Gate = Tensor | Callable[[], Tensor]
"""Factor of each unit, (units,), or a function that returns it at each call."""


class RankAxis:
    """The units of one axis: of one layer, or of all layers that share a tensor of it.

    Args:
        key: "<path of the layer before wrapping>:<axis>", the name of the axis everywhere.
        members: (layer, name of the axis in that layer).
        nested: whether a layer of the axis is one of several in a nest. The gradient of its weight
            then differs from the gradient of W'.
    """

    def __init__(
        self, key: str, members: Sequence[tuple[Parameterization, str]], nested: bool = False
    ) -> None:
        self.key = key
        self.members = list(members)
        self.nested = nested

    def __repr__(self) -> str:
        return f"RankAxis({self.key!r}, {len(self)} units)"

    def __len__(self) -> int:
        slot = self.slots()[0]
        return slot.tensor.shape[slot.dim]

    # Description

    def limits(self) -> tuple[int, int | None]:
        """Return the least and the largest number of units. None means no upper limit."""
        ceilings = [layer.max_units(axis) for layer, axis in self.members]
        return 0, min((ceiling for ceiling in ceilings if ceiling is not None), default=None)

    def allows(self, size: int) -> bool:
        """Return whether a number of units is within the limits."""
        least, largest = self.limits()
        return size >= least and (largest is None or size <= largest)

    def slots(self) -> list[Slot]:
        """List the tensors of the axis, a tied one once, the closing factors last."""
        return slots_of(self.members)

    def closing(self) -> list[Slot]:
        """List the slots that are zero in a closed or fresh unit.

        This is one factor, unless tied layers each keep their own. A square tensor closes with the
        dimensions that it names after the first, where a unit feeds the others.
        """
        return [slot for slot in self.slots() if slot.closes]

    def trainable(self) -> bool:
        """Return whether any tensor of the axis takes a gradient."""
        return any(slot.tensor.requires_grad for slot in self.slots())

    @property
    def enabled(self) -> bool:
        """Whether a layer of the axis is switched on. Otherwise nothing of it trains."""
        return any(layer.enabled for layer, _ in self.members)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that the layers of the axis belong to."""
        return list(dict.fromkeys(layer.name for layer, _ in self.members))

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the axis. An axis without slots has those of its wrappers."""
        tensors = [slot.tensor for slot in self.slots()]
        if tensors:
            return tensors
        return [parameter for layer, _ in self.members for _, parameter in layer.own_parameters()]

    @property
    def stopped(self) -> bool:
        """Whether the units add nothing, because an axis of their layer has none."""
        return all(_is_stopped(layer, axis) for layer, axis in self.members)

    @property
    def multiplies(self) -> bool:
        """Whether this axis stops another one, whose units add nothing while this axis has none."""
        return any(
            other != axis for layer, axis in self.members for other in layer.stopped_by(axis)
        )

    @property
    def capabilities(self) -> frozenset[str]:
        """Capabilities that every layer of the axis has beside pruning.

        "input_factor" and "input_init" come from the tensor that a method names as its input side.
        """
        words = frozenset.intersection(
            *(layer.capabilities | _input_words(layer, axis) for layer, axis in self.members)
        )
        return words - {"weight_gradient"} if self.nested else words

    @property
    def step(self) -> int:
        """Units that are added together where a rule chooses the size: one for each block."""
        return max(layer.parts for layer, _ in self.members)

    # Gates

    @property
    def gate(self) -> Gate | None:
        """Factor of each unit, (units,), or a function that returns it. None means no gate.

        Gradients reach the gate and the factors. Files and merges hold the closing factor with its
        gate multiplied in.
        """
        layer, axis = self.members[0]
        return layer.gates.get(axis)

    @gate.setter
    def gate(self, gate: Gate | None) -> None:
        for layer, axis in self.members:
            gates = {name: value for name, value in layer.gates.items() if name != axis}
            if gate is not None:
                gates[axis] = gate
            layer.gates = gates

    @contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Temporarily multiply the units by a gate, on top of the present gate."""
        present = self.gate
        self.gate = gate if present is None else _product(present, gate)
        try:
            yield
        finally:
            self.gate = present

    @torch.no_grad()
    def fold(self, optimizers: Optimizers = ()) -> None:
        """Multiply the gate into the closing factors and remove it. The function stays the same.

        Copies of the weights in optimizers are multiplied as well.
        """
        axis_names = dict(self.members)
        folded = [slot.layer.gated(slot.name, axis_names[slot.layer]) for slot in self.closing()]
        gate, scaled = self.gate, set()
        for slot, value in zip(self.closing(), folded, strict=True):
            slot.tensor.data.copy_(value)
            if gate is not None and id(slot.tensor) not in scaled:
                scaled.add(id(slot.tensor))
                shape = [1] * slot.tensor.dim()
                shape[slot.layer.axis_tensors(axis_names[slot.layer])[-1][1]] = -1
                scale_copies(slot.tensor, _value(gate).detach().view(shape), optimizers)
        self.gate = None

    # Scores

    def per_unit(
        self, values: Callable[[Slot], Tensor | None], reduce: str = "mean"
    ) -> dict[str, Tensor]:
        """Reduce elementwise values to one number for each unit, tensor by tensor.

        Values of different tensors are never reduced together.

        Args:
            values: slot -> values of the tensor's shape, or None to leave the tensor out.
            reduce: "mean", "sum", or "norm", over all other dimensions.
        Returns:
            label of the tensor -> (units,).
        """
        reduced = {}
        for slot in self.slots():
            elements = values(slot)
            if elements is not None:
                reduced[slot.label] = _reduce(elements, slot.dim, reduce)
        return reduced

    def gate_grad(self) -> Tensor:
        """Return the gradient of the loss by a virtual gate on each unit, at 1: (units,), signed.

        A unit is linear in each of its factors. So by Euler's theorem the gradient is
        <theta, grad theta> over the unit's slice of the closing factor. It costs nothing, and needs
        no gate. A tied layer that took no part in the forward pass adds nothing.

        Raises:
            RuntimeError: if there is no gradient yet.
        """
        closing = self.closing()
        with_grad = {slot.label for slot in closing if slot.tensor.grad is not None}
        if not with_grad and self.stopped:
            return closing[0].tensor.new_zeros(len(self))
        if not with_grad:
            names = ", ".join(slot.name for slot in closing)
            raise RuntimeError(
                f"{self.key}: {names} has no gradient; call gate_grad() after backward()."
            )

        def sensitivity(slot: Slot) -> Tensor | None:
            if slot.label not in with_grad:
                return None
            return slot.tensor.detach() * cast(Tensor, slot.tensor.grad)

        return torch.stack(list(self.per_unit(sensitivity, "sum").values())).sum(0)

    # Closing and resizing

    @torch.no_grad()
    def close(self, units: Sequence[int], optimizers: Optimizers = ()) -> None:
        """Zero the closing slices of the units, their first moments, and copies of their weights.

        So neither momentum nor a slow copy revives the units. The other slices and all second
        moments stay. The closing factor goes on receiving gradients.
        """
        for slot in self.closing():
            index = slot.index(units)
            slot.tensor.data.index_fill_(slot.dim, index, 0)
            close_units(slot.tensor, slot.dim, index, optimizers)

    @contextmanager
    def closed(self, units: Sequence[int]) -> Iterator[None]:
        """Temporarily close the units, for ablation.

        Parameters come back bit by bit. Optimizers are not touched.
        """
        originals = [(slot, slot.tensor.detach().clone()) for slot in self.closing()]
        try:
            self.close(units)
            yield
        finally:
            for slot, original in originals:
                slot.tensor.data.copy_(original)

    @torch.no_grad()
    def resize(
        self,
        keep: Sequence[int] | None = None,
        grow: int = 0,
        generator: torch.Generator | None = None,
        optimizers: Optimizers = (),
        others: "Iterable[RankAxis]" = (),
    ) -> None:
        """Keep these units, in this order, and add `grow` fresh units. The function stays the same.

        Parameters stay the same objects. Optimizer state follows unit by unit. A fresh unit gets
        neutral moments, and its own values in a copy of the weights. Gradients of the old shape are
        dropped.

        Args:
            keep: indices of units, which may permute or repeat, or none. None keeps all.
            grow: number of fresh units, which come last.
            generator: CPU generator for the random numbers of a method. It is needed if grow > 0.
            optimizers: optimizers whose state has to follow.
            others: axes that lend a fresh unit its second moment if no unit is left here.
        Raises:
            ValueError: if an index does not exist, or the upper limit would be exceeded.
        """
        all_units = list(range(len(self)))
        keep = all_units if keep is None else list(keep)
        _check_resize(self, keep, grow)
        if keep != all_units:
            for slot in self.slots():
                replace_units(slot.tensor, slot.dim, keep, None, optimizers)
        if grow:
            generator = generator or torch.Generator().manual_seed(0)
            fresh = fresh_slices(self.key, self.members, grow, generator)
            lenders = [] if keep else list(others)
            for slot in self.slots():
                kept = range(len(keep))
                like = _same_tensors(slot, lenders)
                replace_units(slot.tensor, slot.dim, kept, fresh[slot.label], optimizers, like)
        self._refresh()

    @torch.no_grad()
    def resize_to(self, size: int) -> None:
        """Give every tensor of the axis this size, for loading. Added slices are zero."""
        for slot in self.slots():
            present = slot.tensor.shape[slot.dim]
            if present != size:
                shape = list(slot.tensor.shape)
                shape[slot.dim] = max(0, size - present)
                added = slot.tensor.new_zeros(shape)
                replace_units(slot.tensor, slot.dim, range(min(present, size)), added, ())
        self._refresh()

    def _refresh(self) -> None:
        for layer, _ in self.members:
            layer.renew()


def _is_stopped(layer: Parameterization, axis: str) -> bool:
    empty = [other for other in layer.axes if not layer.axis_size(other)]
    return any(axis in layer.stopped_by(other) for other in empty)


def _same_tensors(slot: Slot, axes: Iterable[RankAxis]) -> list[Tensor]:
    """Return the tensor of a slot in other axes: that of the same name and method."""
    kind = (type(slot.layer), slot.name)
    same = [other for axis in axes for other in axis.slots() if other.name == slot.name]
    return [other.tensor for other in same if (type(other.layer), other.name) == kind]


def _check_resize(axis: RankAxis, keep: Sequence[int], grow: int) -> None:
    size = len(axis)
    least, largest = axis.limits()
    if any(not 0 <= unit < size for unit in keep):
        present = f"units 0 to {size - 1}" if size else "no units"
        raise UserError(f"{axis.key} has {present}; asked to keep {keep}.")
    if len(keep) < least or grow < 0:
        raise UserError(
            f"{axis.key} would keep {len(keep)} units and grow {grow}; use {least} or more, and "
            f"a growth of 0 or more."
        )
    # An axis that is larger than its upper limit may stay as large as it is.
    if largest is not None and len(keep) + grow > max(largest, size):
        raise UserError(
            f"{axis.key} holds at most {largest} units; asked for {len(keep)} + {grow}."
        )


def _reduce(elements: Tensor, dim: int, reduce: str) -> Tensor:
    """Reduce all dimensions but one: (units,)."""
    rows = elements.movedim(dim, 0).flatten(1) if elements.dim() > 1 else elements[:, None]
    # A tensor may have no elements because another axis has no units.
    if not rows.shape[1]:
        return rows.new_zeros(len(rows))
    if reduce == "norm":
        return cast(Tensor, rows.norm(dim=1))
    return cast(Tensor, getattr(rows, reduce)(1))


def _product(first: Gate, second: Gate) -> Callable[[], Tensor]:
    """Return a gate that is the product of two."""

    def product() -> Tensor:
        return _value(first) * _value(second)

    return product


def _value(gate: Gate) -> Tensor:
    return gate() if callable(gate) else gate


def _input_words(layer: Parameterization, axis: str) -> frozenset[str]:
    """Return the capabilities that follow from the tensor that reads the layer's input."""
    name = layer.input_factor.get(axis)
    if name is None:
        return frozenset()
    closes = name == layer.axis_tensors(axis)[-1][0]
    return frozenset({"input_factor"} if closes else {"input_factor", "input_init"})
