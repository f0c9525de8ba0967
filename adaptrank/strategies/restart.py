"""Start wrappers anew: their tensors become what the constructor draws, sizes stay."""

from collections.abc import Iterable

import torch
from torch import Tensor

from adaptrank.axes import RankAxis, generator, resize_stack
from adaptrank.parameterizations import Parameterization, built_again


@torch.no_grad()
def restart(path: str, wrapper: Parameterization, seed: int, round_number: int) -> list[Tensor]:
    """Set the tensors of a wrapper to what its constructor draws, and return those that train.

    Every axis keeps its present size. The draw depends on (seed, path, place in the nest, round)
    alone, so it is the same on all processes and after a resume.

    Args:
        path: path of the layer, for the seed.
        wrapper: the wrapper to start anew.
        seed: seed of the strategy.
        round_number: number of the round that begins.
    """
    random = generator(seed, f"{path}/{len(wrapper.nest)}/restart", round_number)
    fresh = built_again(wrapper, random)
    for axis in wrapper.axes:
        size, drawn = wrapper.axis_size(axis), fresh.axis_size(axis)
        if size != drawn:
            kept, grown = range(min(size, drawn)), max(0, size - drawn)
            RankAxis(path, [(fresh, axis)]).resize(kept, grown, random)
    for stack, tensors in wrapper.stacks.items():
        name, dim = next(iter(tensors.items()))
        resize_stack(wrapper, stack, getattr(fresh, name).shape[dim])
    drawn_tensors = fresh.own_tensors()
    for name, tensor in wrapper.own_tensors().items():
        tensor.data.copy_(drawn_tensors[name])
    wrapper.renew()
    return [parameter for _, parameter in wrapper.own_parameters()]


def trained_tensors(wrappers: Iterable[Parameterization]) -> list[Tensor]:
    """Return the trained tensors of wrappers, a tied one once."""
    tensors: dict[int, Tensor] = {}
    for wrapper in wrappers:
        for _, parameter in wrapper.own_parameters():
            tensors.setdefault(id(parameter), parameter)
    return list(tensors.values())
