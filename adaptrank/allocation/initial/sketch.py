"""Sketch of many rows: their leading right singular vectors, updated batch by batch. Pure."""

import torch
from torch import Tensor


class Sketch:
    """Leading right singular vectors of all rows so far, times their singular values.

    Args:
        components: most vectors to keep.
    """

    def __init__(self, components: int) -> None:
        self.components = components
        self.SV = torch.zeros(0, 0)
        """S_i v_i as row i, (k, n)."""
        self.total = 0.0
        """Sum of squares of all rows."""
        self.cosines = torch.zeros(0)
        """|cosine| between each component and its value before the last batch."""

    def add(self, rows: Tensor) -> None:
        """Take in further rows, (tokens, n)."""
        previous = self.SV
        if len(previous):
            self.SV = _leading(torch.cat([previous.to(rows), rows]), self.components)
        else:
            self.SV = _leading(rows, self.components)
        self.total += float(rows.double().square().sum())
        cosines = []
        for old, new in zip(previous.to(self.SV), self.SV, strict=False):
            cosines.append(float(torch.cosine_similarity(old, new, dim=0).abs()))
        self.cosines = torch.tensor(cosines)

    def merge(self, parts: list[tuple[Tensor, float]]) -> None:
        """Become the sketch of the rows of all processes.

        Args:
            parts: (SV, total) of each process, this one included.
        """
        if len(parts) > 1:
            stacked = torch.cat([SV for SV, _ in parts if len(SV)])
            self.SV = _leading(stacked, self.components)
            self.total = sum(total for _, total in parts)

    def shares(self) -> Tensor:
        """Return S_i^2 over the sum of squares of all rows, (components,)."""
        squares = self.SV.double().square().sum(1).cpu()
        padded = torch.cat([squares, squares.new_zeros(self.components - len(squares))])
        return padded / self.total if self.total else padded

    def settled(self, count: int, tau: float) -> bool:
        """Return whether the first `count` components have a cosine of at least tau."""
        needed = min(count, len(self.SV))
        if needed == 0 or len(self.cosines) < needed:
            return False
        return bool((self.cosines[:count] >= tau).all())

    def direction(self, index: int, whiten: bool) -> Tensor | None:
        """Return the unit vector of a component, or None if the rows had no such direction.

        Args:
            index: of the component.
            whiten: divide the vector by the singular value.
        """
        if index >= len(self.SV) or not bool(self.SV[index].any()):
            return None
        size = float(self.SV[index].norm())
        return self.SV[index] / (size * size if whiten else size)


def _leading(rows: Tensor, components: int) -> Tensor:
    """Return S_i v_i of the leading singular vectors that are not zero, (k, n)."""
    S, Vh = torch.linalg.svd(rows, full_matrices=False)[1:]
    kept = int((S[:components] > 1e-6 * S[0].clamp_min(1e-30)).sum())
    leading: Tensor = S[:kept, None] * Vh[:kept]
    # The sign of a singular vector is free: its largest entry becomes positive.
    largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
    return leading * largest.sign()
