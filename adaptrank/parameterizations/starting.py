"""Fresh units, and the scale at which a method starts a tensor, where no unit is left."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from adaptrank import layers
from adaptrank._errors import UserError

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


def draw_fresh(
    wrapper: "Parameterization", axis: str, n: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw n new slices for every tensor of an axis but the closing one.

    They are normal at the root mean square of the living units. If none is left, or all are zero,
    it is that of the tensor as the constructor draws it.

    Raises:
        UserError: if a tensor is zero at the start, and does not stand last in the axis.
    """
    *opening, (closing, _) = wrapper.axis_tensors(axis)
    slices: dict[str, Tensor] = {}
    for name, dim in opening:
        # A further dimension of a square tensor is zero, too.
        if name == closing or name in slices:
            continue
        living = cast(Tensor, getattr(wrapper, name)).detach()
        # The root mean square is zero without units. It is zero as well where the tensor closes
        # another axis, all of whose units are closed.
        rms = rms_of(living) or start_scale(wrapper, name, generator)
        if rms == 0:
            raise UserError(
                f"{type(wrapper).__name__}.axes[{axis!r}] names {name!r} before the tensor that "
                f"closes the axis, but {name!r} is zero: name the zero-initialized tensor last."
            )
        shape = list(living.shape)
        shape[dim] = n
        slices[name] = rms * torch.randn(shape, generator=generator, dtype=torch.float64)
    return slices
