"""The change of a whole nest as one product of two factors."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptrank import layers

if TYPE_CHECKING:
    from adaptrank.parameterizations.base import Parameterization


@torch.no_grad()
def nest_factors(outermost: "Parameterization") -> tuple[Tensor, Tensor] | None:
    """Return (U (m, k), V (k, n)) with U V = W' - W, in the adapter's dtype.

    Wrappers that are off count for nothing. It is None if a wrapper has no factors, or if the
    innermost layer is no matrix.
    """
    if not isinstance(outermost.innermost, layers.MATRICES):
        return None
    (m, n), dtype = outermost.shape, outermost.adapter_dtype
    Us, Vs = [], []
    for wrapper in outermost.nest:
        if not wrapper.enabled or wrapper.idle:
            continue
        with wrapper.reading_gates():
            factors = wrapper.factors()
        if factors is None:
            return None
        Us.append(factors[0].detach().to(dtype))
        Vs.append(factors[1].detach().to(dtype))
    if not Us:
        like: Any = {"device": layers.device(outermost.innermost), "dtype": dtype}
        return torch.zeros(m, 0, **like), torch.zeros(0, n, **like)
    return (Us[0], Vs[0]) if len(Us) == 1 else (torch.cat(Us, 1), torch.cat(Vs))
