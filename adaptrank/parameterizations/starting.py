"""The scale at which a method starts a tensor, for a unit that grows where none is left."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from adaptrank import layers

if TYPE_CHECKING:
    from adaptrank.parameterizations.base import Parameterization


def rms_of(tensor: Tensor) -> float:
    """Return the root mean square of a tensor's elements, 0 if it has none."""
    values = tensor.detach().double()
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def start_scale(wrapper: "Parameterization", name: str, generator: torch.Generator) -> float:
    """Return the root mean square of a tensor as the constructor draws it.

    The wrapper, its base and the states of all generators stay as they are.

    Args:
        wrapper: the wrapper whose tensor has no units left.
        name: attribute of the wrapper.
        generator: CPU generator that the draw is seeded from.
    """
    return rms_of(cast(Tensor, getattr(built_again(wrapper, generator), name)))


def built_again(wrapper: "Parameterization", generator: torch.Generator) -> "Parameterization":
    """Return the wrapper as its constructor makes it, over the same base, from the same arguments.

    The wrapper, its base and the states of all generators stay as they are.

    Args:
        wrapper: the wrapper to build once more.
        generator: CPU generator that all draws of the constructor are seeded from.
    """
    seed = int(torch.randint(1 << 62, (), generator=generator))
    device = layers.device(wrapper.innermost)
    forked = [device] if device.type == "cuda" else []
    # A constructor freezes its base, of which a bias or a tied weight may be trained.
    trained = [parameter for parameter in wrapper.base.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=forked):
        # torch.manual_seed would seed every GPU, and only those in `forked` are restored.
        torch.default_generator.manual_seed(seed)
        if forked:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            return type(wrapper)(wrapper.base, **wrapper.init_args)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
