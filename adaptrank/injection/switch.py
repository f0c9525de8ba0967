"""Switch adapters on and off, choose one for each row of a batch, and delete them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError, did_you_mean, some
from adaptrank.axes import stop_fitting
from adaptrank.injection.fused import join_fused
from adaptrank.injection.paths import last_name
from adaptrank.injection.trained_whole import forget_trained
from adaptrank.parameterizations import (
    Parameterization,
    enclosed,
    replace_layer,
    wrapped_layers,
    wrappers,
)

Model = TypeVar("Model", bound=nn.Module)

MERGED = "_adaptrank_merged"
"""Attribute of a model that was merged with its originals kept."""


def is_merged(model: nn.Module) -> bool:
    """Return whether a model was merged with its originals kept, so that it can be unmerged."""
    return getattr(enclosed(model), MERGED, None) is not None


def set_enabled(model: nn.Module, enabled: bool | str | Iterable[str] = True) -> None:
    """Switch adapters by flags: all on, all off, or exactly the adapters of the given names.

    A module that trained whole, such as a classifier, has no switch. All adapters use it.

    Raises:
        ValueError: for a name that no wrapper has.
    """
    if isinstance(enabled, bool):
        for wrapper in wrappers(model):
            wrapper.enabled = enabled
        return
    names = [enabled] if isinstance(enabled, str) else list(enabled)
    check_names(model, names)
    for wrapper in wrappers(model):
        wrapper.enabled = wrapper.name in names


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Temporarily switch all adapters off, so that every layer is its frozen base.

    Adapters that were on are on again afterwards. A module that trained whole, such as a
    classifier, keeps its trained values.

    Raises:
        ValueError: if the model is merged, because its layers hold the change then.
    """
    if is_merged(model):
        raise UserError(
            "This model is merged, and its adapters cannot be switched off; unmerge() it first."
        )
    flags = [(wrapper, wrapper.enabled) for wrapper in wrappers(model)]
    try:
        set_enabled(model, False)
        yield
    finally:
        for wrapper, enabled in flags:
            wrapper.enabled = enabled


@contextmanager
def select_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Temporarily use adapter `names[i]` for row i of each batch. None means no adapter.

    Only adapters that are switched on take part. This works for all wrappers of layers. A wrapper
    of a whole module, such as a prefix, refuses. With gradient checkpointing the backward pass
    recomputes activations, so it belongs inside the block as well. A module that trained whole,
    such as a classifier, is the same for all rows, rows of None included.

    Raises:
        ValueError: for a name that no wrapper has, or an adapter on a layer whose weight the model
            reads instead of calling the layer. Inside the block, for a batch of another size.
    """
    check_names(model, [name for name in names if name is not None])
    _check_called(model)
    present = [(wrapper, wrapper.rows) for wrapper in wrappers(model)]
    hooks = [wrapper.call_it() for wrapper, _ in present]
    try:
        for wrapper, _ in present:
            rows = [row for row, name in enumerate(names) if name == wrapper.name]
            device = next(wrapper.parameters()).device
            wrapper.rows = (torch.tensor(rows, dtype=torch.long, device=device), len(names))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for wrapper, rows_before in present:
            wrapper.rows = rows_before


def _check_called(model: nn.Module) -> None:
    """Refuse adapted layers whose weights a module reads without calling the layer."""
    for path, layer in wrapped_layers(model).items():
        if kinds.is_read(layer.innermost):
            raise UserError(
                f"{path}: nn.MultiheadAttention reads this weight instead of calling the layer, "
                f"for all rows at once; adapt with exclude=[{last_name(path)!r}] to select rows."
            )


def delete_adapter(model: Model, name: str = "default") -> Model:
    """Remove every wrapper of a name. Other wrappers stay as they are.

    A fused layer whose parts carry no wrapper any more is one layer again. Modules that were
    trained whole are not touched.

    Returns:
        The same model.
    Raises:
        ValueError: for a name that no wrapper has.
    """
    check_names(model, [name])
    layers = wrapped_layers(model)
    if "" in layers:
        raise UserError(
            "The model is itself a wrapper, and nothing holds it; what it wraps is its `base`."
        )
    for layer in layers.values():
        outermost = _without(layer, name)
        if outermost is not layer:
            replace_layer(model, layer, outermost)
    join_fused(model)
    if not wrapped_layers(model):
        forget_trained(model)
    stop_fitting(model)
    return model


def _without(layer: Parameterization, name: str) -> nn.Module:
    """Rebase the wrappers of a nest that have another name, and return the outermost module."""
    outermost = layer.innermost
    for wrapper in layer.nest:
        if wrapper.name == name:
            continue
        if wrapper.base is not outermost:
            wrapper.base = outermost
            wrapper.renew()
        outermost = wrapper
    return outermost


def check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse names of adapters that no wrapper of the model has."""
    known = list(dict.fromkeys(wrapper.name for wrapper in wrappers(model)))
    for name in names:
        if name not in known:
            raise UserError(
                f"No adapter is called {name!r}; there are {some(known)}."
                f"{did_you_mean(name, known)}"
            )
