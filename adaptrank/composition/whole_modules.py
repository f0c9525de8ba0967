"""Modules that adapters trained whole: keep the base's, or take those of the adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank.artifacts import WEIGHTS, open_weights
from adaptrank.composition.request import Request
from adaptrank.injection import forget_trained

WeightedValue = tuple[float, Tensor]
"""|weight| of an adapter, and its value of a tensor."""


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model under all their names, of which a tied one has several."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


@contextmanager
def restored_modules(
    model: nn.Module, descriptions: Sequence[Mapping[str, Any]], drop: bool
) -> Iterator[None]:
    """Give the modules that were trained whole the base's values again after an error.

    Args:
        model: the base, into which the block loads adapters.
        descriptions: of the adapters.
        drop: whether to give them the base's values after the block in any case.
    """
    tensors = _tensors_of(model)
    names = {name for description in descriptions for name in description["trained_modules"]}
    originals = {tensors[name]: tensors[name].detach().clone() for name in names & tensors.keys()}
    restore = drop
    try:
        yield
    except BaseException:
        restore = True
        raise
    finally:
        if restore:
            with torch.no_grad():
                for tensor, value in originals.items():
                    tensor.copy_(value)
                    tensor.requires_grad_(False)
            forget_trained(model, originals)


@torch.no_grad()
def put_modules(
    model: nn.Module, request: Request, descriptions: Sequence[Mapping[str, Any]]
) -> None:
    """Write the first or the average values of modules that were trained whole.

    Loading has left the values of the last adapter in the model.
    """
    tensors = _tensors_of(model)
    for name, values in _stored_values(request, descriptions).items():
        average = request.others == "average" and values[0][1].is_floating_point()
        tensors[name].copy_(_average(values) if average else values[0][1])


def _stored_values(
    request: Request, descriptions: Sequence[Mapping[str, Any]]
) -> dict[str, list[WeightedValue]]:
    """Read the values of all tensors that were trained whole, from every adapter that has them."""
    values: dict[str, list[WeightedValue]] = {}
    for folder, description, weight in zip(
        request.folders, descriptions, request.weights, strict=True
    ):
        if not description["trained_modules"]:
            continue
        tied = description["tied"]
        with open_weights(folder / WEIGHTS) as stored:
            for name in description["trained_modules"]:
                value = stored[tied.get(name, name)]
                values.setdefault(name, []).append((abs(weight), value))
    return values


def _average(values: Sequence[WeightedValue]) -> Tensor:
    """Return the mean weighted by |weight|, in float64."""
    total = sum(weight for weight, _ in values) or 1.0
    average = torch.zeros((), dtype=torch.float64)
    for weight, value in values:
        average = average + weight / total * value.double()
    return average
