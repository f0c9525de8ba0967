"""Virtual gates on units, and derivatives of the loss with respect to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from adaptrank.allocation.scores.importance import Axes


def gates_at(axes: Axes, value: float) -> dict[str, Tensor]:
    """Return axis -> a leaf of this value, (units,), in the dtype of the closing factor."""
    gates = {}
    for key, axis in axes.items():
        closing = axis.closing()[0].tensor
        gates[key] = torch.full(
            (len(axis),), value, dtype=closing.dtype, device=closing.device, requires_grad=True
        )
    return gates


@contextmanager
def gated(axes: Axes, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the units of all axes by their gates."""
    with ExitStack() as stack:
        for key, axis in axes.items():
            stack.enter_context(axis.gated(gates[key]))
        yield


def dense_grad(
    output: Tensor, leaves: Sequence[Tensor], create_graph: bool = False, keep_graph: bool = False
) -> list[Tensor]:
    """Return the gradient of a scalar in each leaf. It is zero in a leaf that is not used.

    Leaves are not used, and the output may have no graph at all, where layers have no units.

    Args:
        output: scalar.
        leaves: tensors to derive by.
        create_graph: whether the result can be derived once more.
        keep_graph: whether the output can be derived again.
    """
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(
        output,
        leaves,
        create_graph=create_graph,
        retain_graph=create_graph or keep_graph,
        allow_unused=True,
    )
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, grads, strict=True)
    ]
