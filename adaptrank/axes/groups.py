"""Groups of frozen weights that are pruned together: attention heads, and channels of an MLP.

A group is a set of rows and columns in several layers, tied by the model's own computation. The
rows of query, key and value of one head are of no use without the columns of the output projection
that read them. `find_groups` knows the layers by their names. Groups are masked while a model
trains (`Groups.mask`), and cut out afterwards (`compact`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.axes.axis import RankAxis
from adaptrank.axes.model_axes import natural
from adaptrank.axes.state_roles import Optimizers
from adaptrank.parameterizations import Parameterization, named_layers

PRUNED = "pruned_groups"
"""Attribute of a model with masked groups: {key of the groups: indices of the open groups}."""

# Names of the layers of one module. The last layer reads what the others make.
_ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"))
_MLP = (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"))


@dataclass(frozen=True)
class Part:
    """The share of each group in one layer: `width` adjacent rows (dim 0) or columns (dim 1)."""

    name: str
    dim: int
    width: int


class Groups(RankAxis):
    """The groups of one attention or one MLP, in the form of an axis. A unit is a group.

    Args:
        key: "<path>:heads" or "<path>:channels".
        owner: the module that has the layers.
        parts: shares in its layers. The last layer reads what the others make.
        count: number of groups.
    """

    def __init__(self, key: str, owner: nn.Module, parts: Sequence[Part], count: int) -> None:
        layers = [getattr(owner, part.name) for part in parts]
        wrapped = [layer for layer in layers if isinstance(layer, Parameterization)]
        nested = any(len(layer.nest) > 1 for layer in wrapped)
        super().__init__(key, [(layer, "") for layer in wrapped], nested)
        self.owner, self.parts, self.count = owner, parts, count
        self.open = torch.ones(count)
        self._factors: Tensor | None = None
        """0 for each input that a closed group makes, else 1. None if all are open."""

    def __len__(self) -> int:
        return self.count

    def limits(self) -> tuple[int, int | None]:
        return 1, self.count

    def slots(self) -> list[Any]:
        """Return no slots: the pruned weights are frozen, and have no gradient of their own."""
        return []

    def trainable(self) -> bool:
        return any(p.requires_grad for layer, _ in self.members for _, p in layer.own_parameters())

    @torch.no_grad()
    def importance(self) -> Tensor:
        """Return the sum of |G W'| over each group, with the estimated gradient G: (groups,).

        The sums of each layer are divided by their L2 norm before they are added over layers.
        """
        total = torch.zeros(self.count, device=next(self.owner.parameters()).device)
        for part in self.parts:
            layer = getattr(self.owner, part.name)
            if not isinstance(layer, Parameterization) or not _has_gradient(layer):
                continue
            values = (layer.weight_gradient() * layer.dense()).abs().sum(1 - part.dim)
            sums = values.view(self.count, part.width).sum(1).float()
            total += sums / sums.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return total

    def close(self, units: Sequence[int], optimizers: Optimizers = ()) -> None:
        """Mask these groups, and open all others."""
        self.open = torch.ones(self.count)
        self.open[list(units)] = 0
        self._factors = None
        if units:
            # Not made where they are read: a tensor of an evaluation could not be used in training
            # afterwards, and a compiled graph could not keep one.
            device = next(self.reader.parameters()).device
            with torch.inference_mode(False):
                self._factors = self.open.to(device).repeat_interleave(self.parts[-1].width)

    def mask(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Zero the inputs that closed groups make. This is a forward pre-hook of `reader`."""
        x, *others = args
        cut_out = x.shape[-1] != self.count * self.parts[-1].width
        if cut_out or self._factors is None:
            return args
        return x * self._factors.to(x.device, x.dtype), *others

    @property
    def reader(self) -> nn.Module:
        """The layer that reads what the groups make."""
        return cast(nn.Module, getattr(self.owner, self.parts[-1].name))


def _has_gradient(layer: Parameterization) -> bool:
    return any(parameter.grad is not None for _, parameter in layer.own_parameters())


def find_groups(model: nn.Module, wrapped: bool = True) -> dict[str, Groups]:
    """Return the heads and channels of every attention and MLP.

    Their keys come in natural order of the paths. Query heads that share one key and value head are
    one group with it.

    Args:
        model: plain or adapted.
        wrapped: leave out groups that have no wrapped layer.
    """
    by_key: dict[str, Groups] = {}
    for path, module in named_layers(model).items():
        for groups in _groups_of(path, module):
            by_key[groups.key] = groups
    in_order = {key: by_key[key] for key in sorted(by_key, key=natural)}
    if not wrapped:
        return in_order
    return {key: groups for key, groups in in_order.items() if groups.members}


def _groups_of(path: str, module: nn.Module) -> list[Groups]:
    """Return the groups of one module, whether its layers are wrapped or not."""
    groups = []
    attention = _names_in(module, _ATTENTION)
    if attention and hasattr(module, "head_dim"):
        query, key, value, output = attention
        key_rows = _shape(getattr(module, key))[0]
        count = key_rows // int(cast(int, module.head_dim))
        parts = []
        for name in (query, key, value):
            rows, _ = _shape(getattr(module, name))
            parts.append(Part(name, 0, rows // count))
        _, columns = _shape(getattr(module, output))
        parts.append(Part(output, 1, columns // count))
        groups.append(Groups(f"{path}:heads", module, parts, count))

    mlp = _names_in(module, _MLP)
    if mlp:
        *makers, reader = mlp
        parts = [*(Part(name, 0, 1) for name in makers), Part(reader, 1, 1)]
        _, channels = _shape(getattr(module, reader))
        groups.append(Groups(f"{path}:channels", module, parts, channels))
    return groups


def _names_in(module: nn.Module, alternatives: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the first of several tuples of names whose layers a module all has, or ()."""
    for names in alternatives:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return names
    return ()


def _shape(layer: nn.Module) -> tuple[int, int]:
    plain = layer.innermost if isinstance(layer, Parameterization) else layer
    m, n = cast(Tensor, plain.weight).shape
    return m, n


@torch.no_grad()
def compact(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Cut all groups but these out of a model: rows, columns, biases, and the adapters' shares.

    It is for a model that is no longer trained. Parameters become new objects, and tensors that
    were tied across layers are tied no longer.

    Args:
        model: plain or adapted.
        kept: {key: indices of the remaining groups}.
    Raises:
        ValueError: if the model has no such groups, or fewer of them. Nothing is cut then.
    """
    modules = named_layers(model)
    cuts = []
    for key, indices in kept.items():
        groups = _groups_to_cut(modules, key, indices)
        for part in groups.parts:
            index = torch.tensor([i * part.width + j for i in indices for j in range(part.width)])
            cuts.append((getattr(groups.owner, part.name), part.dim, index))
    for layer, dim, index in cuts:
        _cut(layer, dim, index)
    model.__dict__.pop(PRUNED, None)


def _groups_to_cut(modules: Mapping[str, nn.Module], key: str, indices: Sequence[int]) -> Groups:
    path, _, kind = key.rpartition(":")
    candidates = _groups_of(path, modules[path]) if path in modules else []
    groups = next((groups for groups in candidates if groups.key == key), None)
    if groups is None or not indices or not all(0 <= i < len(groups) for i in indices):
        count = "none" if groups is None else str(len(groups))
        raise UserError(
            f"{key} cannot be cut to {len(indices)} {kind}: this model has {count} there."
        )
    return groups


def _cut(layer: nn.Module, dim: int, index: Tensor) -> None:
    """Keep these rows or columns of a layer, and of its wrappers' tensors that follow them."""
    wrappers = layer.nest if isinstance(layer, Parameterization) else []
    plain = layer.innermost if isinstance(layer, Parameterization) else layer
    for wrapper in wrappers:
        for name, dims in wrapper.features.items():
            tensor_dim = dims[dim]
            if tensor_dim is not None:
                _select(wrapper, name, tensor_dim, index)
    _select(plain, "weight", dim, index)
    if dim == 0 and getattr(plain, "bias", None) is not None:
        _select(plain, "bias", 0, index)
    setattr(plain, "out_features" if dim == 0 else "in_features", len(index))


def _select(module: nn.Module, name: str, dim: int, index: Tensor) -> None:
    tensor = getattr(module, name)
    selected = tensor.detach().index_select(dim, index.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(selected, requires_grad=tensor.requires_grad))
    else:
        persistent = name not in module._non_persistent_buffers_set
        module.register_buffer(name, selected, persistent=persistent)
