"""LowRankUpdate: a method whose change is a product of two thin factors."""

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank.ops import low_rank as ops
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula


class LowRankUpdate(Parameterization):
    """W' = W + U V, with U (m, k) and V (k, n) from `factors()`.

    The forward pass follows from the factors. Over a linear layer the product is computed together
    with the layer's own. Elsewhere it is added by `delta`.
    """

    _states_scale: bool = False
    _keeps_delta: bool = False

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        # Decided once, because a forward pass of a small layer waits for Python.
        self._states_scale = _states_scale(type(self))
        self._keeps_delta = type(self).delta is LowRankUpdate.delta

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (U (m, k), V (k, n)) in the adapter's dtype.

        It may be None for arguments whose change has no such form. The method then defines `delta`
        and `weight` for them.
        """

    def scaled_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return (U (m, k), V (k, n), s) with W' = W + s U V, or None as `factors()` does.

        The forward pass multiplies by s within a product. A method with such a number overrides
        this, so that s costs no operation of its own.
        """
        factors = self.factors()
        return None if factors is None else (*factors, 1.0)

    @formula
    def weight(self) -> Tensor:
        U, V = self._factors()
        return self.base_weight + U @ V

    def fuses(self, x: Tensor) -> bool:
        """Return whether the product is computed together with that of the layer.

        A subclass that overrides `delta` replaces the product, unless it overrides this as well.
        """
        return self._keeps_delta and self._is_linear and ops.fits(x)

    def forward_adapted(self, x: Tensor) -> Tensor:
        factors = self._fast_factors() if self.fuses(x) else None
        return super().forward_adapted(x) if factors is None else self.add_product(x, *factors)

    @property
    def only_adds(self) -> bool:
        cls = type(self)
        same_forward = cls.forward_adapted is LowRankUpdate.forward_adapted
        return same_forward and cls.add_low_rank is Parameterization.add_low_rank

    def add_change(self, x: Tensor, y: Tensor) -> Tensor:
        factors = self._fast_factors() if self.fuses(x) else None
        if factors is None:
            return super().add_change(x, y)
        U, V, scale = factors
        z = F.linear(self.apply_dropout(x), V.to(x.dtype))
        return ops.accumulate(y, z.to(y.dtype), U, scale=scale)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        U, V = self._factors()
        return F.linear(self.project(self.apply_dropout(x), V), U)

    def cost(self) -> Cost | None:
        """Return the cost of two products, for factors that are both trained and need no product.

        A method overrides it if a token keeps less, or if the factors are computed.
        """
        U, V = self._factors()
        return Cost(flops=2 * len(V) * (len(U) + V.shape[1]), kept=V.shape[1] + len(V))

    def _fast_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `scaled_factors()`, unless a subclass or an instance replaces only `factors()`."""
        if self._states_scale and "factors" not in self.__dict__:
            return self.scaled_factors()
        return LowRankUpdate.scaled_factors(self)

    def _factors(self) -> tuple[Tensor, Tensor]:
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} has no factors for these arguments.")
        return factors


def _states_scale(cls: type[LowRankUpdate]) -> bool:
    """Return whether `scaled_factors` of a class is at least as specific as its `factors`."""
    definers = [c for c in cls.__mro__ if {"factors", "scaled_factors"} & vars(c).keys()]
    return "scaled_factors" in vars(definers[0])
