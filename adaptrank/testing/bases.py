"""Bases, inputs and builders that the checks of a parameterization are made from."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptrank.parameterizations import Parameterization

Build = Callable[[], Parameterization]
"""Builds the same fresh layer at every call."""
Sample = Callable[[Parameterization, tuple[int, ...]], Tensor]
"""(layer, leading dimensions) -> an input in the dtype of the layer."""

LEADING = ((5,), (2, 3), (2, 1, 3), (0,), (1,))
"""Leading dimensions of the inputs: x of 2, 3 and 4 dimensions, no row and one row."""


def example_bases(cls: type[Parameterization]) -> list[nn.Module]:
    """Return bases in float64 that the method wraps.

    The first is `cls.example()`. If that is a linear layer, the others are the same without its
    bias, and a small embedding and convolution if the method accepts them.
    """
    torch.manual_seed(0)
    base = cls.example().double()
    bases = [base]
    if isinstance(base, nn.Linear):
        bare = copy.deepcopy(base)
        bare.register_parameter("bias", None)
        bases.append(bare)
        others = (nn.Embedding(48, 24), nn.Conv2d(12, 24, 2, stride=2, padding=1))
        bases += [other.double() for other in others if cls.wraps(other)]
    return bases


def builder(cls: type[Parameterization], base: nn.Module, seed: int = 1, **arguments: Any) -> Build:
    """Return a function that wraps a copy of `base`, the same at every call.

    The global random state is left alone.
    """

    def build() -> Parameterization:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(copy.deepcopy(base), **arguments)

    return build


def conv1d(linear: nn.Linear) -> Conv1D:
    """Return transformers' Conv1D that computes what the linear layer computes."""
    twin: Conv1D = Conv1D(linear.out_features, linear.in_features)  # type: ignore[no-untyped-call]
    twin.to(linear.weight.dtype)
    with torch.no_grad():
        twin.weight.copy_(linear.weight.T)
        twin.bias.copy_(torch.zeros_like(twin.bias) if linear.bias is None else linear.bias)
    return twin


def perturb(module: nn.Module, std: float = 0.1, seed: int = 0) -> None:
    """Add normal noise to every trainable tensor.

    Most bugs cannot be seen at the initialization.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_((std * torch.randn(parameter.shape, generator=random)).to(parameter))


def whole_numbers(module: nn.Module, seed: int = 0) -> None:
    """Set every tensor of a module to small whole numbers.

    Their sums are exact in any order of summation.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randint(-3, 4, tensor.shape, generator=random).to(tensor))


def normal_input(layer: Parameterization, leading: tuple[int, ...]) -> Tensor:
    """Return an input of the innermost wrapper, the same at every call.

    By default it is a normal draw (*leading, n).
    """
    return layer.nest[0].example_input(leading, torch.Generator().manual_seed(7))


def trainable(layer: Parameterization) -> dict[str, nn.Parameter]:
    """Return name -> trainable tensor, for the wrapper and the wrappers inside of it."""
    return {
        name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad
    }


def output(module: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a layer, or the first tensor if there are several."""
    return first_tensor(module(x))


def first_tensor(y: Any) -> Tensor:
    """Return a tensor as it is, or the first entry of a tuple or of a model's output."""
    while not isinstance(y, Tensor):
        y = next(iter(y.values() if isinstance(y, Mapping) else y))
    return y


def merges(layer: Parameterization) -> bool:
    """Return whether every wrapper of the nest has a dense form."""
    return all(wrapper.mergeable for wrapper in layer.nest)


def defined(layer: Parameterization) -> bool:
    """Return whether `definition` says what the nest computes.

    It does if all wrappers merge, or if the outermost defines itself around anything.
    """
    return merges(layer) or not layer.mergeable
