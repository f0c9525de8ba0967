"""Makers: parameterizations that still lack their layer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from adaptrank._errors import UserError
from adaptrank.parameterizations import Parameterization

ParameterizationCallable = Callable[[nn.Module], Parameterization]
"""A parameterization that lacks its layer: a class, a partial, or any function of the layer."""


def as_makers(
    parameterization: ParameterizationCallable | Sequence[ParameterizationCallable],
) -> list[ParameterizationCallable]:
    """Return one or several makers as a list, innermost first."""
    makers = [parameterization] if callable(parameterization) else list(parameterization)
    if not makers:
        raise UserError(
            "adapt() needs a parameterization, such as parameterization=partial(LoRA, rank=8)."
        )
    return makers


def method_of(maker: ParameterizationCallable) -> type[Parameterization]:
    """Return the class that a maker builds, or `Parameterization` where that is not known."""
    while isinstance(maker, functools.partial):
        # A YAML file's entry arrives as partial(call, build, cls, ...).
        maker = next(filter(_is_method, maker.args), maker.func)
    maker = getattr(maker, "parameterization", maker)
    return maker if _is_method(maker) else Parameterization  # type: ignore[return-value]


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Parameterization)
