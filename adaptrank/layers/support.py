"""Refuse layers that cannot be wrapped although their type is accepted."""

from collections.abc import Mapping

from torch import nn
from torch.nn.parameter import UninitializedParameter
from transformers.pytorch_utils import Conv1D

from adaptrank.layers.quantized import quantized

_KINDS: Mapping[type[nn.Module], str] = {
    nn.Linear: "a linear layer",
    Conv1D: "a linear layer",
    nn.Embedding: "an embedding",
    nn.Conv2d: "a convolution",
}
"""Kind of layer, whose forward pass makes it a matrix -> the kind in words."""


def unsupported(layer: nn.Module) -> str | None:
    """Return why a layer of an accepted kind cannot be wrapped, or None if it can."""
    for kind, words in _KINDS.items():
        if isinstance(layer, kind):
            return _other_forward(layer, words, kind) or _no_matrix(layer) or _no_weight(layer)
    return None


def _other_forward(layer: nn.Module, words: str, kind: type[nn.Module]) -> str | None:
    """Return a reason if the layer computes something else than layers of its kind do."""
    name = type(layer).__name__
    # The layers of bitsandbytes compute W x with a weight of their own format. Lightning derives
    # classes from them, which inherit the forward pass.
    is_quantized = isinstance(layer, nn.Linear) and (
        quantized(layer) or type(layer).forward.__module__.startswith("bitsandbytes.")
    )
    # A hook of accelerate moves tensors between devices, and calls the forward that it replaced.
    is_replaced = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
    if is_replaced or (type(layer).forward is not kind.forward and not is_quantized):
        return f"{name} changes what {words} computes; leave it out"
    return None


def _no_matrix(layer: nn.Module) -> str | None:
    """Return a reason if the settings of the layer make it more than one constant matrix."""
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"a convolution in {layer.groups} groups is no single matrix; leave it out"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "an embedding with max_norm rewrites its weight in the forward pass; leave it out"
    return None


def _no_weight(layer: nn.Module) -> str | None:
    """Return a reason if the weight or the bias is no parameter that a merge could write."""
    name = type(layer).__name__
    parametrized = layer._modules.get("parametrizations")
    computed = parametrized._modules.keys() if parametrized is not None else ()
    for tensor in ("weight", "bias"):
        # Reading a parametrized weight computes it, and may change the state of a spectral norm.
        if tensor in computed or vars(layer).get(tensor) is not None:
            return (
                f"{name} computes its {tensor} from other tensors (a weight norm, a pruning mask "
                f"or the like); make it a plain parameter, or leave it out"
            )
    if isinstance(layer._parameters.get("weight"), UninitializedParameter):
        return f"{name} has no size yet; pass one batch through the model first"
    return None
