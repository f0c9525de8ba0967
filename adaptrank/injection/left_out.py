"""Weights that "all-linear" cannot wrap exactly: they are found, counted and listed."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from adaptrank import layers as kinds
from adaptrank.injection.paths import ends_in, last_name
from adaptrank.parameterizations import Parameterization, adapter_parameters

log = logging.getLogger("adaptrank")

_HOLDERS = (nn.MultiheadAttention, nn.Bilinear, nn.RNNBase)
"""Modules of torch that multiply by parameters of their own, which are no layers."""

_OTHER_KINDS = (*kinds.MATRICES, nn.modules.conv._ConvNd, nn.EmbeddingBag)
"""Modules whose parameters are no weights of linear layers."""


@dataclass(frozen=True)
class LeftOut:
    """A weight that multiplies activations and cannot be wrapped.

    Args:
        path: path of the layer, or of the parameter.
        numbers: how many numbers it has.
        reason: why it cannot be wrapped.
    """

    path: str
    numbers: int
    reason: str


def left_out_weights(modules: Mapping[str, nn.Module], only_linear: bool = True) -> list[LeftOut]:
    """Return the weights of a model that no method can wrap exactly, in its order.

    Args:
        modules: path -> module, of the whole model.
        only_linear: leave out embeddings and convolutions.
    """
    rescaled = rescaled_layers(modules)
    found = []
    for path, module in modules.items():
        if isinstance(module, Parameterization | kinds.Parts):
            continue
        if isinstance(module, kinds.LINEAR if only_linear else kinds.MATRICES):
            reason = kinds.unsupported(module) or rescaled.get(path)
            if reason:
                numbers = sum(map(kinds.count_numbers, module.parameters()))
                found.append(LeftOut(path, numbers, reason))
        elif not isinstance(module, _OTHER_KINDS):
            found += _weights_of(path, module)
    return found


def _weights_of(path: str, module: nn.Module) -> list[LeftOut]:
    """Return the parameters of a module that it multiplies with, such as the weights of experts."""
    is_of_torch = type(module).__module__.startswith("torch.nn.")
    if is_of_torch and not isinstance(module, _HOLDERS):
        return []
    found = []
    for name, parameter in module.named_parameters(recurse=False):
        dimensions = sum(size > 1 for size in parameter.shape)
        is_matrix = dimensions == 2 and ("weight" in name or name.endswith("proj"))
        if dimensions > 2 or is_matrix:
            reason = (
                f"a parameter of {type(module).__name__}, which is no layer that can be wrapped"
            )
            full_name = f"{path}.{name}" if path else name
            found.append(LeftOut(full_name, parameter.numel(), reason))
    return found


def rescaled_layers(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return path -> reason, of layers whose weights the model multiplies in place by itself.

    RWKV divides some weights by powers of two whenever it is switched to evaluation. The weight of
    a wrapped layer is computed, so that the division would be lost.
    """
    rescaled: dict[str, str] = {}
    for path, module in modules.items():
        every = getattr(getattr(module, "config", None), "rescale_every", 0)
        if not hasattr(module, "_rescale_layers") or not every:
            continue
        prefix = f"{path}." if path else ""
        reason = (
            f"{type(module).__name__} rescales this weight in place; "
            f"set model.config.rescale_every = 0 before it is adapted, or leave it out"
        )
        for number in range(every, len(module.get_submodule("blocks")._modules)):
            for layer in ("attention.output", "feed_forward.value"):
                rescaled[f"{prefix}blocks.{number}.{layer}"] = reason
    return rescaled


def summary(left_out: Iterable[LeftOut], model: nn.Module) -> list[str]:
    """Return a line for each kind of left-out weight: its name, its share and the reason.

    The share is that of the model's parameters, without those of adapters.
    """
    added = {id(parameter) for parameter in adapter_parameters(model)}
    plain = [parameter for parameter in model.parameters() if id(parameter) not in added]
    whole = sum(map(kinds.count_numbers, plain)) or 1
    grouped: dict[tuple[str, str], list[LeftOut]] = {}
    for weight in left_out:
        grouped.setdefault((last_name(weight.path), weight.reason), []).append(weight)
    lines = []
    for (kind, reason), weights in grouped.items():
        share = 100 * sum(weight.numbers for weight in weights) / whole
        count = len(weights)
        lines.append(f"left out: {count} x {kind}, {share:.2g} % of the parameters: {reason}")
    return lines


def warn_of_left_out(
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    wrapped: Collection[Parameterization],
) -> None:
    """Log the weights that the targets mean and that cannot be wrapped.

    A name in a list of targets may mean layers and, elsewhere, a parameter: experts of a mixture
    have a `down_proj` that is no layer. If no wrapped layer is a matrix, nothing is logged.
    """
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        return
    if not any(isinstance(layer.innermost, kinds.MATRICES) for layer in wrapped):
        return
    left_out = left_out_weights(modules, only_linear=targets != "all")
    if not isinstance(targets, str):
        left_out = [weight for weight in left_out if _is_named(weight.path, targets)]
    for line in summary(left_out, modules[""]):
        log.warning("%s.", line[0].upper() + line[1:])


def _is_named(path: str, names: Iterable[str]) -> bool:
    return any(ends_in(path, name) for name in names)
