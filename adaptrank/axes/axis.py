"""Rank axes: the units of every method, what they cost, and how they come and go, optimizer moments included.

All of it is derived from the one line `axes` of a parameterization; nothing here knows a method.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast, overload

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError, UserTypeError
from adaptrank.parameterizations import Parameterization, wrapped_layers, wrappers

Optimizers = Iterable[torch.optim.Optimizer]


@dataclass(frozen=True)
class Slot:
    """One tensor of an axis: `tensor` is attribute `name` of `layer`, and dimension `dim` of it counts the units."""

    layer: Parameterization
    name: str
    label: str  # the name; ".1" for a further dimension of the same tensor; "@2" for a layer's own tensor where others are tied
    dim: int
    closes: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now; of another size after a resize, but a parameter stays the same object."""
        return cast(Tensor, getattr(self.layer, self.name))

    def select(self, units: Sequence[int]) -> Tensor:
        """The slices of the given units: the tensor's shape with len(units) along `dim`."""
        index = torch.tensor(list(units), dtype=torch.long, device=self.tensor.device)
        return self.tensor.detach().index_select(self.dim, index)


class RankAxis:
    """The units of one axis: of one layer, or of all layers that share a tensor of it.

    Args:
        key: "<path of the layer before wrapping>:<axis>", the name of the axis everywhere.
        members: (layer, name of the axis in that layer).
        nested: whether a layer of it is one of several in a nest, so that the gradient of its weight is not that of W'.
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

    def limits(self) -> tuple[int, int | None]:
        """(least, largest) number of units; None is no ceiling."""
        ceilings = [c for layer, axis in self.members if (c := layer.max_units(axis)) is not None]
        return 1, min(ceilings, default=None)

    def slots(self) -> list[Slot]:
        """Every tensor of the axis, a tied one once, the closing factors last."""
        slots: list[Slot] = []
        seen: set[tuple[int, int]] = set()
        for number, (layer, axis) in enumerate(self.members):
            factors = layer.axis_tensors(axis)
            for position, (name, dim) in enumerate(factors):
                tensor = getattr(layer, name)
                if (id(tensor), dim) not in seen:
                    again = any(name == other for other, _ in factors[:position])
                    label = (f"{name}.{dim}" if again else name) + (f"@{number}" if number else "")
                    seen.add((id(tensor), dim))
                    slots.append(
                        Slot(layer, name, label, dim, closes=again or name == factors[-1][0])
                    )
        return sorted(slots, key=lambda slot: slot.closes)

    def closing(self) -> list[Slot]:
        """What is zero in a closed or fresh unit: one factor, unless tied layers each keep their own.

        A square tensor closes with the dimensions it names after the first: there a unit feeds the others.
        """
        return [slot for slot in self.slots() if slot.closes]

    @property
    def capabilities(self) -> frozenset[str]:
        """What every layer of the axis allows beside pruning; an input-side factor is told from what the method names as one."""
        words = frozenset.intersection(
            *(layer.capabilities | _input_words(layer, axis) for layer, axis in self.members)
        )
        return words - {"weight_gradient"} if self.nested else words

    @property
    def step(self) -> int:
        """Units that come at a time where a rule chooses the size: one for each part of the layer."""
        return max(layer.parts for layer, _ in self.members)

    @property
    def gate(self) -> "Tensor | Callable[[], Tensor] | None":
        """What the units are multiplied by, (units,), or a function that gives it at each call; None is nothing.

        Gradients reach the gate and the factors. Files and merges hold the closing factor with its gate multiplied in.
        """
        layer, axis = self.members[0]
        return layer.gates.get(axis)

    @gate.setter
    def gate(self, gate: "Tensor | Callable[[], Tensor] | None") -> None:
        for layer, axis in self.members:
            others = {name: value for name, value in layer.gates.items() if name != axis}
            layer.gates = others if gate is None else {**others, axis: gate}

    @contextmanager
    def gated(self, gate: "Tensor | Callable[[], Tensor]") -> Iterator[None]:
        """Multiply the units by a gate for a moment, on top of the one that hangs there."""
        before = self.gate
        if before is None:
            both = gate
        else:
            inner = before

            def both() -> Tensor:
                return _value(inner) * _value(gate)

        try:
            self.gate = both
            yield
        finally:
            self.gate = before

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the gate into the closing factors, and take it away; the function stays as it is."""
        named = dict(self.members)
        folded = [(slot, slot.layer.gated(slot.name, named[slot.layer])) for slot in self.closing()]
        for slot, value in folded:
            slot.tensor.data.copy_(value)
        self.gate = None

    def trainable(self) -> bool:
        """Whether an optimizer moves any tensor of the axis."""
        return any(slot.tensor.requires_grad for slot in self.slots())

    def per_unit(
        self, values: Callable[[Slot], Tensor | None], reduce: str = "mean"
    ) -> dict[str, Tensor]:
        """Reduce elementwise values to one number a unit, tensor by tensor, never across tensors.

        Args:
            values: slot -> values of the tensor's shape, or None to leave the tensor out.
            reduce: "mean", "sum", or "norm", over all other dimensions.
        Returns:
            label of the tensor -> (units,).
        """
        result = {}
        for slot in self.slots():
            elements = values(slot)
            if elements is not None:
                rows = (
                    elements.movedim(slot.dim, 0).flatten(1)
                    if elements.dim() > 1
                    else elements[:, None]
                )
                result[slot.label] = (
                    rows.norm(dim=1) if reduce == "norm" else getattr(rows, reduce)(1)
                )
        return result

    def gate_grad(self) -> Tensor:
        """Gradient of the loss with respect to a virtual gate on each unit, at 1: (units,), signed.

        A unit is linear in each of its factors, so by Euler's theorem this is <theta, grad theta> over its closing
        factor. It costs nothing, and needs no gate. Of tied layers, one that took no part in the forward adds nothing.

        Raises:
            RuntimeError: if there is no gradient yet.
        """
        closing = {slot.label for slot in self.closing() if slot.tensor.grad is not None}
        if not closing:
            names = ", ".join(slot.name for slot in self.closing())
            raise RuntimeError(
                f"{self.key}: {names} has no gradient; call gate_grad() after backward()."
            )

        def gradient(slot: Slot) -> Tensor | None:
            return (
                slot.tensor.detach() * cast(Tensor, slot.tensor.grad)
                if slot.label in closing
                else None
            )

        return torch.stack(list(self.per_unit(gradient, "sum").values())).sum(0)

    @torch.no_grad()
    def close(self, units: Sequence[int], optimizers: Optimizers = ()) -> None:
        """Zero the closing slices of the units and their first moments, so that momentum does not revive them.

        The other slices, and all second moments, stay; the closing factor goes on receiving gradients.
        """
        for slot in self.closing():
            index = torch.tensor(list(units), dtype=torch.long, device=slot.tensor.device)
            slot.tensor.data.index_fill_(slot.dim, index, 0)
            for optimizer in optimizers:
                for key, value in optimizer.state.get(slot.tensor, {}).items():
                    if (
                        key in _FIRST_MOMENTS
                        and isinstance(value, Tensor)
                        and value.shape == slot.tensor.shape
                    ):
                        value.index_fill_(slot.dim, index, 0)

    @contextmanager
    def closed(self, units: Sequence[int]) -> Iterator[None]:
        """Close the units for a moment, for ablation; parameters come back bit by bit, optimizers are not touched."""
        kept = [(slot, slot.tensor.detach().clone()) for slot in self.closing()]
        try:
            self.close(units)
            yield
        finally:
            for slot, value in kept:
                slot.tensor.data.copy_(value)

    @torch.no_grad()
    def resize(
        self,
        keep: Sequence[int] | None = None,
        grow: int = 0,
        generator: torch.Generator | None = None,
        optimizers: Optimizers = (),
    ) -> None:
        """Keep these units, in this order, and add `grow` fresh ones that leave the function as it is.

        Parameters stay the same objects; their moments follow unit by unit, and a fresh unit gets neutral ones.
        Gradients of the old shape are dropped.

        Args:
            keep: indices of units; may permute or repeat. None keeps all.
            grow: number of fresh units, appended.
            generator: CPU generator for what a method draws; needed if grow > 0.
            optimizers: whose state has to follow.
        Raises:
            ValueError: if an index does not exist, none of the units would be left, or the ceiling would be exceeded.
        """
        size = len(self)
        keep = list(range(size)) if keep is None else list(keep)
        least, largest = self.limits()
        if any(not 0 <= unit < size for unit in keep):
            raise UserError(f"{self.key} has units 0 to {size - 1}; asked to keep {keep}.")
        if (
            len(keep) < least or grow < 0
        ):  # what is fresh takes its size from what lives, so grow does not count
            raise UserError(
                f"{self.key} would keep {len(keep)} units and grow {grow}; at least {least} must stay."
            )
        if largest is not None and len(keep) + grow > max(largest, size):
            raise UserError(
                f"{self.key} holds at most {largest} units; asked for {len(keep)} + {grow}."
            )
        if keep != list(range(size)):
            for slot in self.slots():
                _replace(slot, keep, None, optimizers)
        if grow:
            fresh = self._fresh(grow, generator or torch.Generator().manual_seed(0))
            for slot in self.slots():
                _replace(slot, range(len(keep)), fresh[slot.label], optimizers)
        self._refresh()

    @torch.no_grad()
    def resize_to(self, size: int) -> None:
        """Give every tensor of the axis this size, for loading: what is added is zero and means nothing yet."""
        for slot in self.slots():
            have = slot.tensor.shape[slot.dim]
            if have != size:
                missing = max(0, size - have)
                shape = [
                    missing if d == slot.dim % slot.tensor.dim() else n
                    for d, n in enumerate(slot.tensor.shape)
                ]
                _replace(slot, range(min(have, size)), slot.tensor.new_zeros(shape), ())
        self._refresh()

    def _fresh(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Label -> n new slices; zeros for the closing factors."""
        drawn = {}
        for number, (layer, axis) in enumerate(self.members):
            for name, value in layer.fresh(axis, n, generator).items():
                drawn[name if number == 0 else f"{name}@{number}"] = value
        result = {}
        grown: dict[
            int, list[int]
        ] = {}  # of a tensor with several dimensions on the axis, the later ones see the earlier grown
        for slot in self.slots():
            shape = list(grown.setdefault(id(slot.tensor), list(slot.tensor.shape)))
            grown[id(slot.tensor)][slot.dim] += n
            shape[slot.dim] = n
            value = torch.zeros(shape) if slot.closes else drawn[slot.label]
            if list(value.shape) != shape:
                raise UserError(
                    f"{self.key}: fresh() drew {tuple(value.shape)} for {slot.name}, not {tuple(shape)}."
                )
            result[slot.label] = value.to(slot.tensor)
        return result

    def _refresh(self) -> None:
        for layer, _ in self.members:
            layer.refresh()


def _value(gate: "Tensor | Callable[[], Tensor]") -> Tensor:
    return gate() if callable(gate) else gate


def _input_words(layer: Parameterization, axis: str) -> frozenset[str]:
    name = layer.input_factor.get(axis)
    if name is None:
        return frozenset()
    return frozenset(
        {"input_factor"}
        if name == layer.axis_tensors(axis)[-1][0]
        else {"input_factor", "input_init"}
    )


_FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
_SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})


def _replace(slot: Slot, keep: Sequence[int], fresh: Tensor | None, optimizers: Optimizers) -> None:
    """Set the tensor to its kept slices and the fresh ones, and let the optimizers' state of its shape follow."""
    tensor, dim, old_shape = slot.tensor, slot.dim, slot.tensor.shape
    index = torch.tensor(list(keep), dtype=torch.long, device=tensor.device)
    added = 0 if fresh is None else fresh.shape[dim]

    kept = tensor.detach().index_select(dim, index)
    new = kept if fresh is None else torch.cat([kept, fresh], dim)
    if not isinstance(tensor, nn.Parameter):
        tensor.data = new  # the same object: tied layers may share a buffer
        return
    for optimizer in optimizers:
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old_shape:
                moments = value.index_select(dim, index)
                if added:
                    # Adam keeps one step counter a tensor: a zero second moment would let a fresh unit jump.
                    neutral = key in _SECOND_MOMENTS and moments.shape[dim] > 0
                    fill = (
                        moments.mean(dim, keepdim=True)
                        if neutral
                        else torch.zeros_like(value.narrow(dim, 0, 1))
                    )
                    shape = list(moments.shape)
                    shape[dim] = added
                    moments = torch.cat([moments, fill.expand(shape)], dim)
                state[key] = moments
    tensor.grad = None
    # In two steps, through another dtype: it makes autograd forget the accumulator that still expects the old shape.
    other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = new.contiguous()


# ---- the axes of a model


def rank_axes(model: nn.Module) -> dict[str, RankAxis]:
    """Every rank axis of the model by its key, in natural order of the paths (layer 2 before layer 10).

    Layers that share a tensor of an axis are one axis, named after the first of them.
    """
    members: list[tuple[str, Parameterization, str]] = []
    for path, layer in wrapped_layers(model).items():
        nest = layer.nest
        names = [axis for wrapper in nest for axis in wrapper.axes]
        for position, wrapper in enumerate(nest):
            for axis in wrapper.axes:
                where = path if names.count(axis) == 1 else f"{path}.{position}"
                members.append((f"{where}:{axis}", wrapper, axis))
    members.sort(key=lambda member: natural(member[0]))

    groups: dict[str, list[tuple[Parameterization, str]]] = {}
    owner: dict[tuple[int, int], str] = {}  # (tensor, dimension) -> key of the axis that has it
    nested = {
        id(wrapper)
        for layer in wrapped_layers(model).values()
        if len(layer.nest) > 1
        for wrapper in layer.nest
    }
    for key, wrapper, axis in members:
        tensors = [(id(getattr(wrapper, name)), dim) for name, dim in wrapper.axis_tensors(axis)]
        first = next((owner[tensor] for tensor in tensors if tensor in owner), key)
        groups.setdefault(first, []).append((wrapper, axis))
        owner.update(dict.fromkeys(tensors, first))
    return {
        key: RankAxis(key, group, any(id(w) in nested for w, _ in group))
        for key, group in groups.items()
    }


def natural(key: str) -> list[tuple[int, str]]:
    """Sort key that compares numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


@dataclass(frozen=True)
class CostModel:
    """What sizes cost: `fixed` plus, for each term, its factor times the product of the sizes of its axes.

    Two axes may share a tensor (neighbouring bonds of a tensor train), and one axis may be two dimensions of a square one, so
    costs do not add up unit by unit.
    """

    fixed: int
    terms: tuple[tuple[int, tuple[str, ...]], ...]

    @overload
    def total(self, sizes: Mapping[str, int]) -> int: ...
    @overload
    def total(self, sizes: Mapping[str, float]) -> float: ...
    def total(self, sizes: Mapping[str, float]) -> float:
        """Cost of these sizes, in the model's unit."""
        return self.fixed + sum(
            factor * math.prod(sizes[axis] for axis in axes) for factor, axes in self.terms
        )

    def marginal(self, axis: str, sizes: Mapping[str, int]) -> int:
        """Cost of one more unit of `axis` at these sizes."""
        return sum(
            factor
            * math.prod(sizes[other] for other in rest)
            * (1 if power == 1 else (sizes[axis] + 1) ** power - sizes[axis] ** power)
            for factor, power, rest in self._by_axis.get(axis, ())
        )

    @cached_property
    def _by_axis(self) -> dict[str, list[tuple[int, int, list[str]]]]:
        """Axis -> its terms: factor, how often the axis stands in it, the other axes."""
        index: dict[str, list[tuple[int, int, list[str]]]] = {}
        for factor, axes in self.terms:
            for axis in dict.fromkeys(axes):
                others = [other for other in axes if other != axis]
                index.setdefault(axis, []).append((factor, len(axes) - len(others), others))
        return index


def cost_model(model: nn.Module) -> CostModel:
    """Cost in trainable adapter parameters; tensors on no axis are `fixed`, a tied tensor counts once."""
    on_axis: dict[int, list[tuple[int, str]]] = {}
    for key, axis in rank_axes(model).items():
        for slot in axis.slots():
            on_axis.setdefault(id(slot.tensor), []).append((slot.dim % slot.tensor.dim(), key))
    fixed, terms, seen = 0, [], set()
    for wrapper in wrappers(model):
        for _, parameter in wrapper.own_parameters():
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            dims = on_axis.get(id(parameter), [])
            if dims:
                rest = math.prod(
                    n for d, n in enumerate(parameter.shape) if d not in [dim for dim, _ in dims]
                )
                terms.append((rest, tuple(axis for _, axis in dims)))
            else:
                fixed += parameter.numel()
    return CostModel(fixed, tuple(terms))


def rank_cost(axes: Iterable[str]) -> CostModel:
    """Cost in ranks: one for every unit, whatever it weighs."""
    return CostModel(0, tuple((1, (axis,)) for axis in axes))


def fit_ranks(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Resize every axis to the shapes stored in a state dict of the model, so that it then loads strictly.

    Raises:
        ValueError: if the tensors of one axis are stored with different sizes, or with a size the axis cannot have.
    """
    paths = {module: path for path, module in model.named_modules()}
    for key, axis in rank_axes(model).items():
        stored = {}
        for layer, name in axis.members:
            for tensor, dim in layer.axis_tensors(name):
                full = f"{paths[layer]}.{tensor}".removeprefix(".")
                if full in state_dict:
                    shape, have = state_dict[full].shape, getattr(layer, tensor).shape
                    if len(shape) != len(have):
                        raise UserError(
                            f"{full} was stored with shape {tuple(shape)}, and has {len(have)} dimension(s) here; "
                            f"the file is damaged, or of another model."
                        )
                    stored[f"{full}.{dim}" if full in stored else full] = shape[dim]
        if len(set(stored.values())) > 1:
            sizes = ", ".join(f"{name}: {size}" for name, size in stored.items())
            raise UserError(
                f"The tensors of {key} were stored with different ranks ({sizes}); the file is damaged."
            )
        if stored and (size := next(iter(stored.values()))) != len(axis):
            least, largest = axis.limits()
            if size < least or (largest is not None and size > largest):
                raise UserError(
                    f"{key} was stored with {size} units, and holds {least} to {largest or 'any number'} here; "
                    f"the file is damaged, or of another model."
                )
            axis.resize_to(size)
    for wrapper in wrappers(model):
        wrapper.refresh()


_FOLLOWS = ("Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax")
_CANNOT = ("Rprop", "ASGD", "LBFGS", "Adafactor", "SparseAdam", "Muon")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state cannot follow a resize.

    Others than PyTorch's are judged by their state: each tensor in it must be a single number or have the parameter's
    shape, so call this again once the optimizer has made a step.

    Raises:
        TypeError: names the optimizers that work.
    """
    kinds = type(optimizer).__mro__
    refused = any(kind.__name__ in _CANNOT for kind in kinds)
    # By name only where the name is PyTorch's: other packages have an AdamW whose state is quantized.
    known = any(
        kind.__name__ in _FOLLOWS and kind.__module__.startswith("torch.optim") for kind in kinds
    )
    odd = None
    if not refused and not known:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and value.numel() > 1
                    and value.shape != parameter.shape
                ):
                    odd = f" (its {key!r} has shape {tuple(value.shape)} for a parameter {tuple(parameter.shape)})"
    if refused or odd:
        raise UserTypeError(
            f"{type(optimizer).__name__} keeps state that cannot follow a rank{odd or ''}; "
            f"use {', '.join(_FOLLOWS[:-1])} or {_FOLLOWS[-1]} where ranks move."
        )


def generator(seed: int, axis_key: str, step: int) -> torch.Generator:
    """CPU generator of an event: the same on every process, and the same after a resume."""
    digest = hashlib.blake2b(f"{seed}/{axis_key}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
