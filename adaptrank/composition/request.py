"""A request to compose adapters, and the checks that it has to pass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError, did_you_mean
from adaptrank.artifacts import frozen_weights, shown_adapter
from adaptrank.backbones import fingerprint
from adaptrank.composition.compression import Compression
from adaptrank.composition.operators import OPERATORS
from adaptrank.parameterizations import Parameterization, wrapped_layers

Others = Literal["error", "first", "average", "drop"]
Description = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """The arguments of `compose`, which describes them.

    Args:
        folders: folders of the adapters.
        weights: one for each adapter.
        operator: name of the operator.
        mode: "delta" or "sequential".
        order: positions of the adapters, innermost first, or None.
        compression: how the result is made low-rank.
        merged: whether the result goes into the base's weights.
        others: what happens to modules that were trained whole.
    """

    folders: Sequence[Path]
    weights: Sequence[float]
    operator: str
    mode: str
    order: Sequence[int] | None
    compression: Compression
    merged: bool
    others: Others

    @property
    def count(self) -> int:
        """Number of adapters."""
        return len(self.folders)

    @property
    def sequence(self) -> list[int]:
        """Positions of the adapters in the order in which they are loaded, innermost first."""
        return list(range(self.count) if self.order is None else self.order)

    @property
    def names(self) -> list[str]:
        """Short names of the adapters: the last parts of their paths in which they differ."""
        parts = [Path(shown_adapter(folder.resolve())).parts for folder in self.folders]
        longest = max(map(len, parts))
        depth = 1
        while len({p[-depth:] for p in parts}) < len(set(parts)) and depth < longest:
            depth += 1
        names = ["/".join(p[-depth:]) for p in parts]
        return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]


def adapter_name(position: int) -> str:
    """Return the name under which an adapter is loaded while it is composed."""
    return f"composed-{position}"


def position_of(wrapper: Parameterization) -> int:
    """Return the position of the adapter to which a wrapper belongs; see `adapter_name`."""
    return int(wrapper.name.rpartition("-")[2])


def check_request(model: nn.Module, request: Request) -> None:
    """Refuse a request that no adapters could meet, before a file is read."""
    if wrapped_layers(model):
        raise UserError(
            "compose starts from the base alone, and this model holds adapters already."
        )
    if not request.folders:
        raise UserError("There is no adapter to compose; name their folders.")
    _check_weights(request)
    if request.operator not in OPERATORS:
        raise UserError(
            f"operator={request.operator!r} is unknown.{did_you_mean(request.operator, OPERATORS)} "
            f"There are {', '.join(OPERATORS)}."
        )
    if request.mode not in ("delta", "sequential"):
        raise UserError(f"mode={request.mode!r} is unknown; use 'delta' or 'sequential'.")
    if request.mode == "sequential":
        _check_plain_nesting(request)
    _check_order(request)


def _check_weights(request: Request) -> None:
    weights = request.weights
    if len(weights) != request.count:
        raise UserError(f"{len(weights)} weights for {request.count} adapters; give one for each.")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"weights={list(weights)}: finite numbers.")


def _check_plain_nesting(request: Request) -> None:
    weighted = any(weight != 1 for weight in request.weights)
    if weighted or request.operator != "sum" or request.compression or request.merged:
        raise UserError(
            "mode='sequential' nests the adapters as they are: weights, operators, compression and "
            "merging are for mode='delta'."
        )


def _check_order(request: Request) -> None:
    order = request.order
    if order is None:
        return
    if request.mode == "delta":
        raise UserError("order is for mode='sequential'; a sum in delta space has none.")
    if sorted(order) != list(range(request.count)):
        raise UserError(
            f"order={list(order)}: each of 0 to {request.count - 1} once, innermost first."
        )


def check_described(
    model: nn.Module, request: Request, descriptions: Sequence[Description]
) -> None:
    """Refuse adapters of different bases, and adapters that have no sum."""
    # A fingerprint leaves out the modules that its adapter trained whole. Where these differ, only
    # the model itself can be compared with every adapter.
    same_modules = len({tuple(d["trained_modules"]) for d in descriptions}) == 1
    for folder, description in zip(request.folders, descriptions, strict=True):
        if same_modules:
            base, owner = descriptions[0]["base"], f"{request.folders[0]} on"
        else:
            base, owner = _base_of(model, description), "the base is"
        if description["base"]["fingerprint"] != base["fingerprint"]:
            raise UserError(
                f"{folder} was trained on {_spell_base(description['base'])}, and {owner} "
                f"{_spell_base(base)}; adapters add up on one base only."
            )
        if "pruned" in description:
            raise UserError(
                f"{folder} cuts heads or channels out of its base, and adds up with nothing."
            )
        if description["trained_modules"] and request.others == "error":
            raise UserError(
                f"{folder} trained {description['trained_modules'][0]} whole, and there is no sum "
                f"of such modules; say which to take with others: 'first', 'average' or 'drop'."
            )
    if request.others not in ("error", "first", "average", "drop"):
        raise UserError(
            f"others={request.others!r} is unknown; use 'error', 'first', 'average' or 'drop'."
        )


def _base_of(model: nn.Module, description: Description) -> dict[str, str]:
    """Describe this model as a base, without the modules that an adapter trained whole."""
    weights = frozen_weights(model, description["trained_modules"])
    return {"name": "this model", "fingerprint": fingerprint(weights)}


def _spell_base(base: Mapping[str, Any]) -> str:
    return f"{base.get('name') or 'an unnamed base'} (fingerprint {base['fingerprint']})"


def check_wrappers(model: nn.Module, request: Request) -> None:
    """Refuse loaded adapters that the mode cannot put together."""
    for path, layer in wrapped_layers(model).items():
        for wrapper in layer.nest:
            folder = request.folders[position_of(wrapper)]
            method = type(wrapper).__name__
            if request.mode == "delta":
                is_matrix = isinstance(layer.innermost, kinds.MATRICES)
                if not is_matrix or not wrapper.mergeable:
                    raise UserError(
                        f"{folder}: {method} at {path} changes no single matrix, and has no sum; "
                        f"use mode='sequential'."
                    )
            elif _needs_order(wrapper, request):
                raise UserError(
                    f"{folder}: {method} may read the weight that it changes, so that the order "
                    f"matters; say it, innermost first: order={list(range(request.count))}."
                )


def _needs_order(wrapper: Parameterization, request: Request) -> bool:
    return request.order is None and request.count > 1 and wrapper.factors() is None
