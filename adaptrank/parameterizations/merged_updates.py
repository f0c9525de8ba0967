"""MergedUpdates: the sum of the changes that earlier rounds of a run have merged."""

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.ops import low_rank as ops
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate


class MergedUpdates(LowRankUpdate, listed=False):
    """W' = W + B A + D, with frozen B (m, k), A (k, n) and D (m, n) in float32.

    A training strategy that merges and restarts puts it between a layer and the wrappers that
    train, and adds their change to it at the end of each round. The frozen weight W is never
    written, so nothing is lost to the rounding of a half-precision weight, however many rounds
    there are. As a wrapper of the nest it is saved, loaded, merged and exported like any other.

    Changes that are products are kept as their factors, until the matrix D would be smaller.
    Changes of another form go into D at once. Nothing here trains, and no allocator moves it.

    Shapes: W (m, n), B (m, k), A (k, n), D (m, n), or (0, n) while it is not needed.
    """

    source = ""
    accepts = layers.MATRICES
    stacks = {"merged": {"A": 0, "B": 1}, "merged_dense": {"D": 0}}
    features = {"A": (None, 1), "B": (0, None), "D": (0, 1)}
    A: Tensor
    B: Tensor
    D: Tensor

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        m, n = self.shape
        device = layers.device(self.innermost)
        for name, shape in (("A", (0, n)), ("B", (m, 0)), ("D", (0, n))):
            empty = torch.zeros(shape, device=device, dtype=self.adapter_dtype)
            self.register_buffer(name, empty)
        self.renew()

    @torch.no_grad()
    def add(self, change: Tensor | tuple[Tensor, Tensor]) -> None:
        """Add a change of the weight, D (m, n), or U (m, k) and V (k, n) whose product it is."""
        if isinstance(change, tuple):
            U, V = change
            self.B = torch.cat([self.B, U.detach().to(self.B)], 1)
            self.A = torch.cat([self.A, V.detach().to(self.A)])
        if not isinstance(change, tuple) or len(self.D) or self._factors_are_larger():
            self._make_dense(None if isinstance(change, tuple) else change)
        self.renew()

    def _factors_are_larger(self) -> bool:
        m, n = self.shape
        return len(self.A) * (m + n) > m * n

    def _make_dense(self, change: Tensor | None) -> None:
        """Add the factors, and a further change if there is one, to D. Sums are in float64."""
        total = self.B.double() @ self.A.double()
        if change is not None:
            total += change.double()
        if len(self.D):
            total += self.D.double()
        self.D = total.to(self.B)
        self.B, self.A = self.B[:, :0].contiguous(), self.A[:0].contiguous()

    @formula
    def weight(self) -> Tensor:
        W = self.base_weight + self.B @ self.A
        return W + self.D if len(self.D) else W

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if len(self.D) else (self.B, self.A)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        return self.project(x, self.D) if len(self.D) else super().delta(x, y)

    def fuses(self, x: Tensor) -> bool:
        return not len(self.D) and self._is_linear and ops.fits(x)

    def renew(self) -> None:
        super().renew()
        self.idle = not len(self.A) and not len(self.D)

    def refresh(self) -> None:
        """Refuse a dense change that has only some of its rows, as a damaged file may give it."""
        if len(self.D) not in (0, self.shape[0]):
            raise UserError(
                f"The merged change of a layer has {len(self.D)} of {self.shape[0]} rows; the file "
                f"is damaged."
            )

    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(flops=2 * (len(self.A) * (m + n) + len(self.D) * n))


def insert_ledger(outermost: Parameterization) -> None:
    """Put an empty `MergedUpdates` between a layer and its wrappers, unless there is one."""
    innermost_wrapper = outermost.nest[0]
    if isinstance(innermost_wrapper, MergedUpdates):
        return
    ledger = MergedUpdates(innermost_wrapper.base)
    ledger.name = innermost_wrapper.name
    ledger.train_own(innermost_wrapper.training)
    innermost_wrapper.base = ledger
    for wrapper in outermost.nest[1:]:
        wrapper.nest_depth += 1
