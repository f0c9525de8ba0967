"""Gradients of frozen weights, from the inputs of a layer and the gradients of its outputs."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.allocation.context import Axes, Run

Place = tuple[str, int]
"""Axis key, and the index of a layer among the members of the axis."""


def average_gradients(
    axes: Axes, run: Run, batches: Iterable[Any], most: int
) -> dict[Place, Tensor]:
    """Return the mean gradient of each weight, (m, n), over batches and processes, on the CPU.

    G = sum over tokens of dL/dy x^T, so the weight itself needs no gradient. Layers that take no
    part in the forward passes are left out.

    Args:
        axes: axes whose layers are watched.
        run: run with a model and a loss.
        batches: training batches.
        most: most batches to read.
    Raises:
        UserError: if there are no batches.
    """
    sums: dict[Place, Tensor] = {}
    handles = []
    for key, axis in axes.items():
        for index, (layer, _) in enumerate(axis.members):
            handles.append(layer.register_forward_hook(_watch_output(sums, (key, index))))
    batches_read = 0
    try:
        for batch in islice(batches, most):
            with torch.enable_grad():
                trained = [p for p in run.model.parameters() if p.requires_grad]
                # The gradients themselves are not needed: the hooks see those of the outputs.
                torch.autograd.grad(run.loss(batch), trained, allow_unused=True)
            batches_read += 1
    finally:
        for handle in handles:
            handle.remove()
    if batches_read == 0:
        raise UserError(
            f"{run.owner} looks at training batches, and got none. Give `start` batches and a loss."
        )
    return {place: run.reduce(sums[place] / batches_read) for place in sorted(sums)}


def _watch_output(sums: dict[Place, Tensor], place: Place) -> Callable[..., None]:
    """Return a forward hook that adds the gradient of a layer's weight to the sum of its place."""

    def add(inputs: Tensor, grad: Tensor) -> None:
        gradient = (grad.flatten(0, -2).float().T @ inputs.flatten(0, -2).float()).cpu()
        sums[place] = sums[place] + gradient if place in sums else gradient

    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, args[0].detach()))  # type: ignore[no-untyped-call]

    return hook
