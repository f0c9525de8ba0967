"""Assertions with a sentence, and the loss that the checks run backward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adaptrank.parameterizations import Parameterization

TOLERANCE = 1e-10
"""Relative and absolute tolerance of a comparison in float64."""


def describe(layer: Parameterization) -> str:
    """Return the classes of a nest, the outermost first."""
    return " on ".join(type(wrapper).__name__ for wrapper in reversed(layer.nest))


@contextmanager
def explaining(sentence: str) -> Iterator[None]:
    """Put a sentence before the message of an assertion."""
    try:
        yield
    except (AssertionError, RuntimeError, TypeError) as error:
        raise AssertionError(f"{sentence}\n{error}") from error


def assert_close(
    actual: Tensor, expected: Tensor, sentence: str, tolerance: float | None = None
) -> None:
    """Assert that two tensors agree, by default to `TOLERANCE`."""
    limit = TOLERANCE if tolerance is None else tolerance
    with explaining(sentence):
        torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


def loss_of(y: Tensor) -> Tensor:
    """Return a loss that depends on every output."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return (y * weights).sum() + y.square().mean()


def run_backward(y: Tensor) -> None:
    """Run a backward pass from a loss that depends on every output."""
    torch.autograd.backward(loss_of(y))
