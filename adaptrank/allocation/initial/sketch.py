"""Sketch of many rows: their principal directions, updated batch by batch. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """First and second moments of some rows, of which the second may be truncated.

    Args:
        SV: matrix (k, n) for which SV^T SV = sum (x - mean) (x - mean)^T.
        mean: mean of the rows, (n,), in float64. It is zero in an uncentred sketch.
        total: sum of |x - mean|^2 over all rows, never truncated.
        rows: number of rows.
    """

    SV: Tensor
    mean: Tensor
    total: float
    rows: int


class Sketch:
    """Leading right singular vectors of all rows so far, after their mean is subtracted.

    S_i is the i-th singular value of the centred rows (tokens, n), and v_i its right singular
    vector. Memory is bounded by (components + 1) n numbers, however many rows arrive. With
    components >= n, or at least as many as the rank of the centred rows, the sketch is exact.
    With fewer, the mean and the total are exact, and the directions are those of an incremental
    principal component analysis.

    Args:
        components: most vectors to keep.
        center: subtract the mean of the rows.
    """

    def __init__(self, components: int, center: bool = True) -> None:
        self.components = components
        self.center = center
        self.moments = Moments(torch.zeros(0, 0), torch.zeros(0), 0.0, 0)
        self.cosines = torch.zeros(0)
        """|cosine| between each component and its value before the last batch."""

    @property
    def SV(self) -> Tensor:
        """S_i v_i as row i, (k, n)."""
        return self.moments.SV

    def add(self, rows: Tensor) -> None:
        """Take in further rows, (tokens, n)."""
        if len(rows) == 0:
            return
        previous = self.SV.to(rows)
        self._become([self.moments, _moments_of(rows, self.center)])
        cosines = []
        for old, new in zip(previous, self.SV, strict=False):
            cosines.append(float(torch.cosine_similarity(old, new, dim=0).abs()))
        self.cosines = torch.tensor(cosines)

    def merge(self, parts: Sequence[Moments]) -> None:
        """Become the sketch of the rows of all processes.

        Args:
            parts: moments of each process, this one included.
        """
        if len(parts) > 1 and any(part.rows for part in parts):
            self._become(parts)

    def shares(self) -> Tensor:
        """Return the explained variance ratios S_i^2 / total, (components,)."""
        squares = self.SV.double().square().sum(1).cpu()
        padded = torch.cat([squares, squares.new_zeros(self.components - len(squares))])
        return padded / self.moments.total if len(squares) else padded

    def settled(self, count: int, tau: float) -> bool:
        """Return whether the first `count` components have a cosine of at least tau."""
        if count == 0:
            return True
        needed = min(count, len(self.SV))
        if needed == 0 or len(self.cosines) < needed:
            return False
        return bool((self.cosines[:count] >= tau).all())

    def direction(self, index: int, whiten: bool) -> Tensor | None:
        """Return the unit vector of a component, or None if the rows had no such direction.

        Args:
            index: of the component.
            whiten: divide the vector by the square root of the singular value.
        """
        if index >= len(self.SV):
            return None
        S = float(self.SV[index].norm())
        return self.SV[index] / (S**1.5 if whiten else S)

    def _become(self, parts: Sequence[Moments]) -> None:
        moments = _combined([part for part in parts if part.rows])
        self.moments = moments._replace(SV=_leading(moments, self.components))


def _moments_of(rows: Tensor, center: bool) -> Moments:
    """Return the moments of rows, (tokens, n)."""
    mean = rows.mean(0, dtype=torch.float64)
    if not center:
        mean = torch.zeros_like(mean)
    centred = rows - mean.to(rows.dtype)
    return Moments(centred, mean, float(centred.double().square().sum()), len(rows))


def _combined(parts: Sequence[Moments]) -> Moments:
    """Return the moments of the rows of all parts together.

    The scatter around the common mean is the sum of the scatters around the means of the parts,
    and of rows (mean - common mean) (mean - common mean)^T. The latter is one more row of SV.
    """
    device, dtype = parts[-1].SV.device, parts[-1].SV.dtype
    total_rows = sum(part.rows for part in parts)
    means = torch.stack([part.mean.to(device) for part in parts])
    counts = torch.tensor([part.rows for part in parts], device=device, dtype=torch.float64)
    mean = counts @ means / total_rows
    shifts = counts.sqrt()[:, None] * (means - mean)
    total = sum(part.total for part in parts) + float(shifts.square().sum())
    scatters = [part.SV.to(device, dtype) for part in parts if len(part.SV)]
    return Moments(torch.cat([*scatters, shifts.to(dtype)]), mean, total, total_rows)


def _leading(moments: Moments, components: int) -> Tensor:
    """Return S_i v_i of the leading singular vectors that are more than rounding, (k, n).

    Rows that are equal up to rounding have no direction: singular values below a millionth of
    the norm of all rows, their mean included, are dropped.
    """
    S, Vh = torch.linalg.svd(moments.SV, full_matrices=False)[1:]
    norm = (moments.total + moments.rows * float(moments.mean.square().sum())) ** 0.5
    kept = int((S[:components] > 1e-6 * norm).sum())
    leading: Tensor = S[:kept, None] * Vh[:kept]
    # The sign of a singular vector is free: its largest entry becomes positive.
    largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
    return leading * largest.sign()
