"""Groups of the frozen weights that can go together: attention heads, and channels of an MLP.

A group is a set of rows and columns in several layers, tied by the model's own computation: the rows of query, key and value of one head
are of no use without the columns of the output projection that read them. `find_groups` knows them by the names of the layers;
what it finds is masked while a model trains (`mask`), and cut out afterwards (`compact`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.axes.axis import Optimizers, RankAxis, natural
from adaptrank.parameterizations import Parameterization, named_layers

PRUNED = "pruned_groups"
"""Attribute of a model: {key of the groups: indices of those that are left}, for what is masked."""

_ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"))
_MLP = (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"))


@dataclass(frozen=True)
class Part:
    """What a layer has of each group: `width` rows (dim 0) or columns (dim 1) in a row."""

    name: str
    dim: int
    width: int


class Groups(RankAxis):
    """The groups of one attention or one MLP, in the form of an axis: a unit is a group.

    Args:
        key: "<path>:heads" or "<path>:channels".
        owner: the module that has the layers.
        parts: of its layers; the last one reads what the others make.
        count: number of groups.
    """

    def __init__(self, key: str, owner: nn.Module, parts: Sequence[Part], count: int) -> None:
        wrapped = [
            (layer, "")
            for part in parts
            if isinstance(layer := getattr(owner, part.name), Parameterization)
        ]
        super().__init__(key, wrapped, any(len(layer.nest) > 1 for layer, _ in wrapped))
        self.owner, self.parts, self.count = owner, parts, count
        self.open = torch.ones(count)

    def __len__(self) -> int:
        return self.count

    def limits(self) -> tuple[int, int | None]:
        return 1, self.count

    def slots(self) -> list[Any]:
        """None: what is pruned is frozen, and has no gradient of its own."""
        return []

    def trainable(self) -> bool:
        return any(p.requires_grad for layer, _ in self.members for _, p in layer.own_parameters())

    @torch.no_grad()
    def importance(self) -> Tensor:
        """Sum of |G W'| over each group, G the estimated gradient: of each layer by its L2 norm, then over layers; (groups,)."""
        total = torch.zeros(self.count, device=next(self.owner.parameters()).device)
        for part in self.parts:
            layer = getattr(self.owner, part.name)
            if isinstance(layer, Parameterization) and any(
                p.grad is not None for _, p in layer.own_parameters()
            ):
                values = (layer.weight_gradient() * layer.dense()).abs().sum(1 - part.dim)
                sums = values.view(self.count, part.width).sum(1).float()
                total += sums / sums.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return total

    def close(self, units: Sequence[int], optimizers: Optimizers = ()) -> None:
        """Mask these groups, and open all others."""
        self.open = torch.ones(self.count)
        self.open[list(units)] = 0

    def mask(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook of the layer that reads what the groups make: what closed ones make is zero."""
        x, *rest = args
        if (
            bool(self.open.all()) or x.shape[-1] != self.count * self.parts[-1].width
        ):  # none is closed, or they are cut out
            return args
        mask = self.open.to(x).repeat_interleave(self.parts[-1].width)
        return x * mask, *rest

    @property
    def reader(self) -> nn.Module:
        """The layer that reads what the groups make."""
        return cast(nn.Module, getattr(self.owner, self.parts[-1].name))


def find_groups(model: nn.Module) -> dict[str, Groups]:
    """Heads and channels of every attention and MLP that has a wrapped layer, by their keys in natural order of the paths.

    Query heads that share one key and value head are one group with it.
    """
    found = {
        groups.key: groups
        for path, module in named_layers(model).items()
        for groups in _groups_of(path, module)
    }
    return {key: found[key] for key in sorted(found, key=natural) if found[key].members}


def _groups_of(path: str, module: nn.Module) -> list[Groups]:
    """Of one module, whether its layers are wrapped or not."""

    def named(kinds: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
        return next(
            (k for k in kinds if all(isinstance(getattr(module, n, None), nn.Module) for n in k)),
            None,
        )

    found = []
    if (names := named(_ATTENTION)) and hasattr(module, "head_dim"):
        q, k, v, o = names
        count = _shape(getattr(module, k))[0] // int(cast(int, module.head_dim))
        widths = {name: _shape(getattr(module, name))[0] // count for name in (q, k, v)}
        widths[o] = _shape(getattr(module, o))[1] // count
        parts = [Part(name, int(name == o), widths[name]) for name in names]
        found.append(Groups(f"{path}:heads", module, parts, count))
    if names := named(_MLP):
        last = names[-1]
        parts = [Part(name, int(name == last), 1) for name in names]
        found.append(Groups(f"{path}:channels", module, parts, _shape(getattr(module, last))[1]))
    return found


def _shape(layer: nn.Module) -> tuple[int, int]:
    plain = layer.innermost if isinstance(layer, Parameterization) else layer
    m, n = cast(Tensor, plain.weight).shape
    return m, n


@torch.no_grad()
def compact(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Cut out of a model all groups but these: rows, columns, biases and the adapters' own rows and columns.

    For a model that is not trained any more: parameters become new objects, and what was tied across layers is tied no longer.

    Args:
        model: plain or adapted.
        kept: {key: indices of the groups that stay}.
    Raises:
        ValueError: if the model has no such groups, or not so many.
    """
    modules, cuts = named_layers(model), []
    for key, indices in kept.items():
        path, _, kind = key.rpartition(":")
        there = {g.key: g for g in _groups_of(path, modules[path])} if path in modules else {}
        groups = there.get(key)
        if groups is None or not indices or not all(0 <= i < len(groups) for i in indices):
            have = "none" if groups is None else str(len(groups))
            raise UserError(
                f"{key} cannot be cut to {len(indices)} {kind}: this model has {have} there."
            )
        for part in groups.parts:
            index = torch.tensor([i * part.width + j for i in indices for j in range(part.width)])
            cuts.append((getattr(groups.owner, part.name), part.dim, index))
    for layer, dim, index in cuts:  # all or nothing
        _cut(layer, dim, index)
    model.__dict__.pop(PRUNED, None)


def _cut(layer: nn.Module, dim: int, index: Tensor) -> None:
    wrappers = layer.nest if isinstance(layer, Parameterization) else []
    plain = layer.innermost if isinstance(layer, Parameterization) else layer
    for wrapper in wrappers:
        for name, dims in wrapper.features.items():
            if (own := dims[dim]) is not None:
                _select(wrapper, name, own, index)
    _select(plain, "weight", dim, index)
    if dim == 0 and getattr(plain, "bias", None) is not None:
        _select(plain, "bias", 0, index)
    setattr(plain, "out_features" if dim == 0 else "in_features", len(index))


def _select(module: nn.Module, name: str, dim: int, index: Tensor) -> None:
    tensor = getattr(module, name)
    cut = tensor.detach().index_select(dim, index.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
    else:
        module.register_buffer(name, cut, persistent=name not in module._non_persistent_buffers_set)
