"""Fold every enabled adapter into the frozen weights, in float32, with one cast at the end."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError
from adaptrank.artifacts.rounding import RoundingLoss
from adaptrank.axes import stop_fitting
from adaptrank.injection import (
    MERGED,
    fold_rows,
    forget_trained,
    is_merged,
    join_fused,
    trained_rows,
)
from adaptrank.parameterizations import (
    Parameterization,
    enclosed,
    replace_layer,
    wrapped_layers,
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Originals:
    """The originals of a merged model, from which `unmerge` restores it.

    Args:
        layers: path -> (the wrapper, the original parameters by name).
        fused: {joined layer: the parts that it was}.
    """

    layers: dict[str, tuple[Parameterization, dict[str, Tensor | None]]] = field(
        default_factory=dict
    )
    fused: dict[nn.Module, nn.Module] = field(default_factory=dict)

    def restore(self, model: nn.Module) -> None:
        """Put the original layers and weights back into the model."""
        for fused, parts in self.fused.items():
            replace_layer(model, fused, parts)
        for layer, values in reversed(self.layers.values()):
            kinds.write(layer.innermost, values)
            replace_layer(model, layer.innermost, layer)


def merge(model: Model, keep_originals: bool = False) -> Model:
    """Replace every wrapper by its innermost layer with the effective weight W'.

    The sum is taken in float32 (float64 over a float64 base) and cast once. The change of a weak
    adapter can vanish in the rounding to bf16. The log says so if more than a fifth of it is lost.

    Args:
        model: any module that holds wrappers.
        keep_originals: keep wrappers and original weights, so that `unmerge` restores both bit by
            bit.
    Returns:
        The same model.
    Raises:
        ValueError: if there is nothing to merge, a method has no dense form, a weight is tied to
            another module, or a merged weight is not finite. The model is unchanged then.
    """
    root = enclosed(model)
    layers = wrapped_layers(root)
    if is_merged(root):
        raise UserError(
            "This model is merged already, with its originals kept; unmerge() it first."
        )
    if not layers:
        raise UserError("This model holds no adapter to merge.")
    if "" in layers:
        raise UserError(
            "The model is itself a wrapper, and nothing holds it; merge a module that does: "
            "nn.Sequential(layer)."
        )
    if keep_originals and trained_rows(root):
        raise UserError(
            "Rows of added tokens train by themselves in this model, and no copy of them is kept; "
            "merge with keep_originals=False."
        )
    _check_mergeable(root, layers)
    originals, loss = Originals(), RoundingLoss()
    try:
        # Inner layers come first: a module that is wrapped whole folds its change into layers of
        # its own, which have to be plain by then.
        for path in sorted(layers, key=lambda path: -path.count(".")):
            layer = layers[path]
            originals.layers[path] = (layer, _write_merged(path, layer, loss))
            replace_layer(root, layer, layer.innermost)
        originals.fused = join_fused(root)
    except BaseException:
        originals.restore(root)
        raise
    loss.warn(
        "Merging lost %.0f %% of the adapter's change to rounding; "
        "merge into a float32 model to keep it."
    )
    if keep_originals:
        setattr(root, MERGED, originals)
    else:
        forget_trained(root)
        stop_fitting(root)
    fold_rows(root)
    return model


@torch.no_grad()
def _write_merged(
    path: str, layer: Parameterization, loss: RoundingLoss
) -> dict[str, Tensor | None]:
    """Write the merged parameters into the innermost layer, and return the original ones."""
    for name, exact, original, dtype in merged_parameters(layer):
        rounded = exact.to(dtype)
        if not torch.isfinite(rounded).all():
            raise UserError(
                f"{path}: the merged {name} is not finite in {dtype}; merge a float32 model."
            )
        loss.add(exact, rounded, original)
    return kinds.write(layer.innermost, layer.merged())


def unmerge(model: Model) -> Model:
    """Undo `merge(model, keep_originals=True)`: restore wrappers and weights, bit by bit.

    Returns:
        The same model.
    Raises:
        ValueError: if the originals were not kept.
    """
    root = enclosed(model)
    originals = getattr(root, MERGED, None)
    if not isinstance(originals, Originals):
        raise UserError(
            "Nothing to unmerge: merge with keep_originals=True, "
            "or load the adapter on a fresh base."
        )
    originals.restore(root)
    delattr(root, MERGED)
    return model


def merged_parameters(layer: Parameterization) -> Iterator[tuple[str, Tensor, Tensor, torch.dtype]]:
    """Yield (name, merged value, frozen value, frozen dtype) of each parameter that merging writes.

    A parameter that the frozen layer does not have counts as zero.
    """
    frozen = dict(layer.innermost.named_parameters())
    for name, value in layer.merged().items():
        parameter = frozen.get(name)
        if parameter is None:
            yield name, value, torch.zeros_like(value), kinds.dtype(layer.innermost)
        else:
            yield name, value, parameter.to(value.dtype), parameter.dtype


@torch.no_grad()
def rounding_error(model: nn.Module, dtype: torch.dtype) -> float:
    """Return |round(W') - W'| / |W' - W| over all adapted layers, for rounding to a dtype.

    The error is about 0.43 u |W| / |W' - W| until it nears 1, with u = 2^-8 in bf16 and 2^-11 in
    fp16. In bf16 a change of 2e-4 of the weight is lost almost whole.
    """
    loss = RoundingLoss()
    for layer in wrapped_layers(model).values():
        for _, exact, original, _ in merged_parameters(layer):
            loss.add(exact, exact.to(dtype), original)
    return loss.share()


def _check_mergeable(model: nn.Module, layers: Mapping[str, Parameterization]) -> None:
    users = _users_of_weights(model)
    for path, layer in layers.items():
        for wrapper in layer.nest:
            if wrapper.rows is not None:
                raise UserError(
                    f"Adapter {wrapper.name!r} is on for some rows of a batch only, and a merged "
                    f"weight is for all; merge outside of select_rows()."
                )
            if wrapper.enabled and not wrapper.mergeable:
                raise UserError(
                    f"{path}: {type(wrapper).__name__} has no dense form and cannot be merged."
                )
        if not any(wrapper.enabled and not wrapper.idle for wrapper in layer.nest):
            # Nothing is written into this layer.
            continue
        plain = layer.innermost
        if kinds.quantized(plain):
            raise UserError(
                f"{path} is quantized, and rounding would eat the change; "
                f"load the adapter onto the unquantized base and merge there."
            )
        using = users.get(id(getattr(plain, "weight", None)), [])
        others = [other for other, module in using if module is not plain]
        if others:
            raise UserError(
                f"{path} shares its weight with {others[0]}, which merging would change too; "
                f"exclude it."
            )


def _users_of_weights(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return id of a weight -> (path, module) of every module that has it."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append((path, module))
    return users
