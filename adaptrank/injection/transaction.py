"""All or nothing: after an error a model is what it was before it was adapted."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from adaptrank import layers as kinds
from adaptrank.injection.trained_whole import recorded_names, restore_names
from adaptrank.parameterizations import (
    named_layers,
    plain_modules,
    plain_parameters,
    replace_layer,
)


@contextmanager
def undone_on_error(
    model: nn.Module,
    fused: Mapping[kinds.Parts, nn.Module],
    trained_whole: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Restore a model's layers, its flags and its record of trained modules if the block fails.

    Layers that were split for the block are whole again.

    Args:
        model: the model whose layers the block wraps. Nothing is frozen or wrapped yet.
        fused: {the parts: the layer}, of the layers that were split just before.
        trained_whole: modules whose flags the block sets, wrappers inside of them included.
    """
    original_layers = named_layers(model)
    flags = {parameter: parameter.requires_grad for parameter in plain_parameters(model)}
    for layer in (*fused.values(), *trained_whole):
        flags |= {parameter: parameter.requires_grad for parameter in layer.parameters()}
    recorded = {module: recorded_names(module) for module in plain_modules(model)}
    try:
        yield
    except BaseException:
        for path, layer in named_layers(model).items():
            # A part of a split layer has no place among the original layers.
            original = original_layers.get(path, layer)
            if layer is not original:
                replace_layer(model, layer, original)
        for parts, layer in fused.items():
            replace_layer(model, parts, layer)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, names in recorded.items():
            restore_names(module, names)
        raise
