"""The pairs of factors of a model, found from what its wrappers state, and seen as blocks."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.parameterizations import FactorPair, Parameterization, wrappers

DECIDE_THE_OUTPUT = ("weight", "factors", "forward_adapted", "delta", "penalty")
"""Members of a method that its statement `factor_pair()` speaks about."""


@dataclass(frozen=True)
class Factor:
    """One factor of a pair of a wrapper, the other one being its dual.

    A factor is seen as blocks (k, d, r) with d rows and r columns, one for each unit. Blocks with
    fewer units than others are padded by columns of zeros.

    Args:
        wrapper: the wrapper.
        pair: what the wrapper states now. A change of units may change it.
        side: "B" or "A".
    """

    wrapper: Parameterization
    pair: FactorPair
    side: Literal["B", "A"]

    @cached_property
    def tensor(self) -> Tensor:
        """The tensor as the wrapper has it."""
        return cast(Tensor, getattr(self.wrapper, self.name_and_dim[0]))

    @property
    def name_and_dim(self) -> tuple[str, int]:
        """Name of the tensor, and its dimension that counts units."""
        return self.pair.B if self.side == "B" else self.pair.A

    @cached_property
    def dual(self) -> "Factor":
        """The other factor of the pair."""
        return Factor(self.wrapper, self.pair, "A" if self.side == "B" else "B")

    @property
    def moves(self) -> bool:
        """Whether the factor trains and has a gradient, and the pair has a unit."""
        tensor = self.tensor
        return tensor.requires_grad and tensor.grad is not None and bool(tensor.numel())

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the factor's form as blocks (k, d, r)."""
        _, dim = self.name_and_dim
        rows = tensor if dim == 1 else tensor.mT  # (d, units)
        blocks = self.pair.blocks
        if blocks is None:
            return rows[None]
        padded = F.pad(rows, (0, 1))
        return padded[:, blocks.flatten()].view(len(rows), *blocks.shape).movedim(1, 0)

    def unblock(self, values: Tensor) -> Tensor:
        """Return blocks (k, d, r) in the form of the factor's tensor."""
        _, dim = self.name_and_dim
        blocks = self.pair.blocks
        if blocks is None:
            rows = values[0]
        else:
            units = self.tensor.shape[dim]
            flat = values.movedim(0, 1).flatten(1)
            # Padding goes into one more column, which is dropped.
            padded = flat.new_zeros(len(flat), units + 1)
            rows = padded.index_copy_(1, blocks.flatten(), flat)[:, :units]
        return rows if dim == 1 else rows.mT


def why_no_pair(wrapper: Parameterization) -> str:
    """Return why a wrapper has no pair of factors to train together, as a clause; "" if it has."""
    if wrapper.factor_pair() is None:
        return "does not depend on two factors through their product alone"
    cls = type(wrapper)
    stated = _definer(cls, "factor_pair")
    for name in DECIDE_THE_OUTPUT:
        definer = _definer(cls, name)
        # Where the definition is more specific than the statement, nobody knows if it still holds.
        if definer is not stated and issubclass(definer, stated):
            return f"redefines {name}() and does not state factor_pair() anew"
    if wrapper.gates:
        return "has units that are multiplied by gates"
    return ""


def _definer(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


def left_factor(wrapper: Parameterization) -> Factor:
    """Return the left factor of the pair of a wrapper that has one."""
    return Factor(wrapper, cast(FactorPair, wrapper.factor_pair()), "B")


def find_wrappers(model: nn.Module, optimizer: str) -> list[Parameterization]:
    """Return one wrapper of each pair of factors of a model. A pair that is tied counts once.

    Args:
        model: the adapted model.
        optimizer: name of the optimizer, for errors.
    Raises:
        UserError: if one factor belongs to several pairs.
    """
    pair_of: dict[int, tuple[int, ...]] = {}
    found: dict[tuple[int, ...], Parameterization] = {}
    for wrapper in wrappers(model):
        if why_no_pair(wrapper):
            continue
        left = left_factor(wrapper)
        parameters = [f.tensor for f in (left, left.dual) if isinstance(f.tensor, nn.Parameter)]
        ids = tuple(map(id, parameters))
        # A dual that is no parameter is another one in each layer.
        is_shared = len(ids) == 1 and ids in found
        if is_shared or any(pair_of.setdefault(each, ids) != ids for each in ids):
            raise UserError(_refusal_of_tie(wrapper, optimizer))
        found.setdefault(ids, wrapper)
    return list(found.values())


def _refusal_of_tie(wrapper: Parameterization, optimizer: str) -> str:
    method = type(wrapper).__name__
    advice = f"give {method} share: false" if wrapper.shared else "untie the layers"
    return (
        f"{optimizer} cannot train {method} where layers share a factor and not its dual: "
        f"{advice}, or use torch.optim.AdamW."
    )


def stack(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Return tensors of one shape as one, in a dtype."""
    return torch.stack([tensor.to(dtype) for tensor in tensors])
