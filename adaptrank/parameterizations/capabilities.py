"""Capabilities that the rank axes of a method have beside pruning."""

from enum import StrEnum


class Capability(StrEnum):
    """One thing that an axis allows. An allocator that requires more is refused with a reason.

    A member equals its word, so that `frozenset({"grow"})` and `frozenset({Capability.GROW})` are
    the same set.
    """

    GROW = "grow"
    """Fresh units can be added."""
    DUPLICATE = "duplicate"
    """Units are exchangeable, so a copy of a unit is a unit like any other."""
    ORDERED = "ordered"
    """The first units alone are a smaller method of the same kind."""
    PATTERN = "pattern"
    """The number of units may differ from layer to layer by a rule."""
    MATRIX_RANK = "matrix_rank"
    """The number of units bounds the rank of the change."""
    INPUT_DIRECTIONS = "input_directions"
    """Each unit is one direction of the input."""
    GRADIENT_INIT = "gradient_init"
    """The closing factor can start at the least-squares fit of the gradient of W."""
    WEIGHT_GRADIENT = "weight_gradient"
    """The gradients of the factors give an estimate of that of W, in `weight_gradient()`."""
    INPUT_FACTOR = "input_factor"
    """A trained factor multiplies the input. Derived from `input_factor`, never declared."""
    INPUT_INIT = "input_init"
    """The input factor is not the closing one and may start anywhere. Derived, never declared."""


DEFAULT_CAPABILITIES = frozenset(
    {Capability.GROW, Capability.DUPLICATE, Capability.ORDERED, Capability.PATTERN}
)
"""Capabilities of a method that declares none."""
