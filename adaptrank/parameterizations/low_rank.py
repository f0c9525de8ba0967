"""LowRankUpdate: a method whose change is a product of two thin factors."""

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor

from adaptrank.ops import low_rank as ops
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula


class LowRankUpdate(Parameterization):
    """W' = W + U V, with U (m, k) and V (k, n) from `factors()`.

    The forward pass follows from the factors. Over a linear layer the product is computed together
    with the layer's own. Elsewhere it is added by `delta`.
    """

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (U (m, k), V (k, n)) in the adapter's dtype.

        It may be None for arguments whose change has no such form. The method then defines `delta`
        and `weight` for them.
        """

    @formula
    def weight(self) -> Tensor:
        U, V = self._factors()
        return self.base_weight + U @ V

    def fuses(self, x: Tensor) -> bool:
        """Return whether the product is computed together with that of the layer.

        A subclass that overrides `delta` replaces the product, unless it overrides this as well.
        """
        return type(self).delta is LowRankUpdate.delta and super().fuses(x)

    def forward_adapted(self, x: Tensor) -> Tensor:
        factors = self.factors() if self.fuses(x) else None
        return super().forward_adapted(x) if factors is None else self.add_product(x, *factors)

    @property
    def only_adds(self) -> bool:
        cls = type(self)
        same_forward = cls.forward_adapted is LowRankUpdate.forward_adapted
        return same_forward and cls.add_low_rank is Parameterization.add_low_rank

    def add_change(self, x: Tensor, y: Tensor) -> Tensor:
        factors = self.factors() if self.fuses(x) else None
        if factors is None:
            return super().add_change(x, y)
        U, V = factors
        z = F.linear(self.apply_dropout(x), V.to(x.dtype))
        return ops.accumulate(y, z.to(y.dtype), U)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        U, V = self._factors()
        return F.linear(self.project(self.apply_dropout(x), V), U)

    def cost(self) -> Cost | None:
        """Return the cost of two products, for factors that are both trained and need no product.

        A method overrides it if a token keeps less, or if the factors are computed.
        """
        U, V = self._factors()
        return Cost(flops=2 * len(V) * (len(U) + V.shape[1]), kept=V.shape[1] + len(V))

    def _factors(self) -> tuple[Tensor, Tensor]:
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} has no factors for these arguments.")
        return factors
