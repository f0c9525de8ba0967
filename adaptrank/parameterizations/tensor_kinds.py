"""Kinds of trained tensors, by what they do to a layer."""

from enum import StrEnum


class TensorKind(StrEnum):
    """One kind of trained tensor. A learning rate can be given to all tensors of a kind.

    A member equals its word, so that `{"m": "magnitudes"}` and `{"m": TensorKind.MAGNITUDES}` are
    the same mapping.
    """

    FACTORS = "factors"
    """Matrices whose product is added. It is the kind of a tensor of which a method says nothing.
    """
    SCALES = "scales"
    """Factors of rows, columns, units or logits, one number each."""
    MAGNITUDES = "magnitudes"
    """Norms of the rows of W'."""
    OFFSETS = "offsets"
    """Vectors that are added to an output."""
    COEFFICIENTS = "coefficients"
    """Numbers that weigh the terms of a sum of frozen matrices."""
    PREFIXES = "prefixes"
    """Keys and values that precede those of the tokens, and the network that makes them."""
