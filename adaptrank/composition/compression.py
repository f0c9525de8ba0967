"""Compress a composed change: the choice of its rank."""

from dataclasses import dataclass

from adaptrank._errors import UserError
from adaptrank.composition.changes import Change, rank_for


@dataclass(frozen=True)
class Compression:
    """Rule by which a result is made low-rank.

    With none of the arguments a product stays as it is, and a matrix is refused.

    Args:
        rank: rank of every layer.
        energy: fraction of the sum of squared singular values that the least rank of each layer
            has to keep.
        error: relative error that the least rank of each layer may have.
        parameters: parameters of all layers together, spent where most energy is.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(given)} were given; a result is compressed by one of them."
            )
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank={self.rank}: 1 or more.")
        for name in ("energy", "error"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name}={value}: above 0, and at most 1.")

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def rank_of(self, change: Change) -> int | None:
        """Return the rank of one layer's change, or None if the change stays as it is."""
        if not self:
            return None
        return self.rank or rank_for(change, self.energy, self.error)
