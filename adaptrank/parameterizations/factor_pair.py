"""FactorPair: two factors on whose product alone the output of a layer depends."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FactorPair:
    """The factors B (m, r) and A (r, n) of a layer whose output depends on s B A alone.

    So (B T, T^-1 A) is the same layer for every invertible T (r, r). Optimizers of factor pairs
    rely on it. A factor may be frozen, and then it may be a buffer or a property.

    Args:
        B: name of the left factor, and its dimension that counts units.
        A: name of the right factor, and its dimension that counts units.
        scale: s, or one number for each block, (k,).
        blocks: units of each block, (k, width), padded with the number of units, where only units
            of one block may be mixed. None is one block with all units.
    """

    B: tuple[str, int]
    A: tuple[str, int]
    scale: float | Tensor = 1.0
    blocks: Tensor | None = None
