"""Fused projections: split one layer into its parts, and join the parts again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError, did_you_mean
from adaptrank.injection.makers import ParameterizationCallable, method_of
from adaptrank.injection.match import innermost
from adaptrank.injection.paths import last_name
from adaptrank.injection.trained_whole import record_trained, recorded_names
from adaptrank.parameterizations import (
    Parameterization,
    named_layers,
    replace_layer,
    wrapped_layers,
)

KNOWN_PARTS: Mapping[str, Sequence[str]] = {
    "c_attn": ("q", "k", "v"),
    "qkv": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
}
"""Last component of a path -> names of the equal parts that are stacked in the layer's outputs."""


@dataclass
class SplitLayers:
    """The result of splitting a model's fused layers.

    Args:
        layers: {the parts: the fused layer that they replace}.
        refusals: {path of a fused layer that cannot be split: the reason}.
    """

    layers: dict[kinds.Parts, nn.Module] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def keep_matched(
        self, model: nn.Module, modules: Mapping[str, nn.Module], paths: Sequence[str]
    ) -> None:
        """Join the split layers again of which no part is to be wrapped.

        All fused layers were split, so that targets could name their parts.

        Raises:
            ValueError: if a path names a layer that should have been split and could not be.
        """
        for path in paths:
            if path in self.refusals:
                raise UserError(
                    f"{path} {self.refusals[path]}, so that its parts are no layers of their own; "
                    f"say split_fused=False."
                )
        matched = [modules[path] for path in paths]
        for parts, layer in self.layers.items():
            if not any(module in parts.plain for module in matched):
                replace_layer(model, parts, layer)


def split_fused_layers(
    model: nn.Module,
    makers: Sequence[ParameterizationCallable],
    split_fused: bool | Mapping[str, Sequence[str]] | None,
) -> SplitLayers:
    """Replace every fused layer by its parts, as `split_fused` of `adapt` says.

    Raises:
        ValueError: if a mapping names no layer, or a layer that has no such equal parts.
    """
    if split_fused is None:
        split_fused = any(method_of(maker).reads_blocks for maker in makers)
    if split_fused is False:
        return SplitLayers()
    modules = named_layers(model)
    if isinstance(split_fused, Mapping):
        _check_named(split_fused, modules)
        fused = _named_fused(modules, split_fused)
    else:
        fused = _known_fused(modules)

    split = SplitLayers()
    for path, names in fused.items():
        layer = modules[path]
        if isinstance(layer, Parameterization):
            split.refusals[path] = "carries an adapter as a whole"
        elif kinds.quantized(layer):
            split.refusals[path] = "is quantized as a whole"
        else:
            split.layers[_split(layer, names)] = layer
    for parts, layer in split.layers.items():
        replace_layer(model, layer, parts)
    return split


def _check_named(table: Mapping[str, Sequence[str]], modules: Mapping[str, nn.Module]) -> None:
    for name in table:
        if not any(name in (path, last_name(path)) for path in modules):
            hint = did_you_mean(name, map(last_name, modules))
            raise UserError(f"split_fused names {name!r}, which is no layer here.{hint}")


def _named_fused(
    modules: Mapping[str, nn.Module], table: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """Return path -> names of the parts, of the linear layers that a user's table names."""
    fused = {}
    for path, layer in modules.items():
        names = table.get(path) or table.get(last_name(path))
        plain = innermost(layer)
        if names is None or not isinstance(plain, kinds.LINEAR):
            continue
        outputs, _ = kinds.shape(plain)
        if outputs % len(names):
            raise UserError(
                f"split_fused: {path} has {outputs} outputs, "
                f"which are not {len(names)} equal parts."
            )
        fused[path] = names
    return fused


def _known_fused(modules: Mapping[str, nn.Module]) -> dict[str, Sequence[str]]:
    """Return path -> names of the parts, of the linear layers with a known name and shape."""
    fused = {}
    for path, layer in modules.items():
        names = KNOWN_PARTS.get(last_name(path))
        plain = innermost(layer)
        if names is None or not isinstance(plain, kinds.LINEAR):
            continue
        outputs, inputs = kinds.shape(plain)
        # Query, key and value are square each. The parts of an MLP need not be.
        square = outputs == len(names) * inputs
        if outputs % len(names) == 0 and (square or last_name(path) == "gate_up_proj"):
            fused[path] = names
    return fused


def split_at(model: nn.Module, parts: Mapping[str, Sequence[str]]) -> dict[kinds.Parts, nn.Module]:
    """Split the layers at these paths into parts of these names, unless they are split so already.

    Returns:
        {the parts: the layer that they replace}.
    Raises:
        ValueError: if a path names no layer that can be split so.
    """
    split: dict[kinds.Parts, nn.Module] = {}
    modules = named_layers(model)
    for path, names in parts.items():
        layer = modules.get(path)
        if isinstance(layer, kinds.Parts) and layer.names == tuple(names):
            continue
        listed = ", ".join(names)
        if not isinstance(layer, kinds.LINEAR) or kinds.shape(layer)[0] % len(names):
            wrapped = isinstance(layer, Parameterization)
            reason = "carries an adapter as a whole here" if wrapped else "is none here"
            raise UserError(
                f"The adapter wraps the parts {listed} of a linear layer {path}, which {reason}."
            )
        if kinds.quantized(layer):
            raise UserError(
                f"The adapter wraps the parts {listed} of {path}, "
                f"which is quantized as a whole here."
            )
        split[_split(layer, names)] = layer
    for split_layer, layer in split.items():
        replace_layer(model, layer, split_layer)
    return split


def join_fused(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Join split layers again where no part carries a wrapper any more.

    Returns:
        {the fused layer: the parts that it replaces}.
    """
    joined: dict[nn.Module, nn.Module] = {}
    split_layers = [module for module in model.modules() if isinstance(module, kinds.Parts)]
    for split_layer in split_layers:
        if not wrapped_layers(split_layer):
            fused = split_layer.join()
            if any(recorded_names(part) for part in split_layer.plain):
                record_trained(fused, fused.parameters())
            replace_layer(model, split_layer, fused)
            joined[fused] = split_layer
    return joined


def _split(layer: nn.Module, names: Sequence[str]) -> kinds.Parts:
    """Return the parts of a fused layer, which train whole if the layer does."""
    parts = kinds.Parts(layer, names)
    if recorded_names(layer):
        record_trained(parts, parts.parameters())
    return parts
