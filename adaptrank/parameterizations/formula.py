"""`formula`, the decorator of a method's `weight`, and its evaluation."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptrank import layers
from adaptrank._errors import UserTypeError

if TYPE_CHECKING:
    from adaptrank.parameterizations.base import Parameterization

    # A type checker knows what a property is, and reads `formula` as one.
    formula = property
else:

    class formula(property):  # noqa: N801
        """A property whose function is the paper's formula for W' (m, n).

        The function computes W' in the adapter's dtype, float32 or better, and `dense()` returns
        that. Read as an attribute, W' has the dtype of the frozen layer, as the weight of a plain
        layer would: models such as T5 read it to cast their activations. It is the weight of the
        base if the wrapper is off.
        """

        def __get__(self, wrapper, owner=None):
            if wrapper is None:
                return self
            if not hasattr(wrapper.innermost, "weight"):
                raise AttributeError(f"{type(wrapper.innermost).__name__} has no weight.")
            return evaluate(wrapper, self.fget).to(layers.dtype(wrapper.innermost))


def dense_weight(wrapper: "Parameterization") -> Tensor:
    """Return W' (m, n) of the wrapper's formula, in the adapter's dtype."""
    return evaluate(wrapper, inspect.getattr_static(type(wrapper), "weight").fget)


def evaluate(wrapper: "Parameterization", compute: Callable[[Any], Tensor]) -> Tensor:
    """Compute W' without autocast, or return the weight of the base if the wrapper is off.

    Raises:
        RuntimeError: if the formula raises AttributeError. nn.Module would report that error as
            "no attribute 'weight'".
    """
    if not wrapper.enabled:
        return wrapper.base_weight
    device = layers.device(wrapper.innermost).type
    # The meta device has no autocast.
    can_autocast = torch.amp.is_autocast_available(device)
    exact = torch.autocast(device, enabled=False) if can_autocast else nullcontext()
    # A method that does not merge leaves the weight alone, whatever its gates.
    gates = wrapper.reading_gates() if wrapper.mergeable else nullcontext()
    try:
        with exact, gates:
            return compute(wrapper)
    except AttributeError as error:
        raise RuntimeError(f"{type(wrapper).__name__}.weight failed: {error}") from error


def check_formula(wrapper: "Parameterization") -> None:
    """Refuse a `weight` without `@formula` over a half-precision layer.

    Raises:
        UserTypeError: says what to write.
    """
    if isinstance(inspect.getattr_static(type(wrapper), "weight"), formula):
        return
    dtype = layers.dtype(wrapper.innermost)
    if dtype not in (torch.float32, torch.float64):
        raise UserTypeError(
            f"{type(wrapper).__name__}.weight is a @property, which is float32 over a layer in "
            f"{dtype}; write @formula in its place (from adaptrank.parameterizations)."
        )
