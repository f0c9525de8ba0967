"""The contract of an optimizer that asks the adapters of a model about their tensors."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank._options import DECAY, NOT_NEGATIVE, POSITIVE, Range, check_number, ranges_of
from adaptrank.parameterizations import Parameterization, adapter_parameters, wrappers
from adaptrank.registry import Registry

log = logging.getLogger("adaptrank")

OPTIMIZERS: Registry["ModelOptimizer"] = Registry("optimizer")
"""Class name -> class, of the optimizers that know adapters."""

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | nn.Module
"""Input of an optimizer: a model, its trained parameters, or groups of them."""


class ModelOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that is told the model, because parameters alone do not say what they are.

    It takes a model, `LoRARITE(model)`, and trains what requires a gradient. Or it takes parameters
    or groups, as every optimizer of PyTorch does, and is then told the model by `bind(model)`. The
    task modules do that. Which tensors belong together is asked of the wrappers, and never found
    from the order of parameters.
    """

    source: ClassVar[str]
    """arXiv id of the method."""
    ranges: ClassVar[Mapping[str, Range]] = {
        "lr": NOT_NEGATIVE,
        "betas": DECAY,
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
    }
    """Numeric argument -> the values that make sense."""
    mixes_units: ClassVar[bool] = False
    """Whether a step mixes the units of an axis, so that a single unit means nothing to it. An
    allocator that multiplies units by gates is refused beside it."""
    own_rates: ClassVar[bool] = False
    """Whether it chooses the ratio of the two factors' learning rates. LoRA+ is refused then."""
    clips: bool = False
    """Whether it clips by itself, so that a trainer must not clip the gradients of factors."""
    _model: nn.Module | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Trainers make subclasses of an optimizer at run time, behind a class of their own.
        if issubclass(cls.__bases__[0], ModelOptimizer):
            OPTIMIZERS.add(cls)

    @classmethod
    @abstractmethod
    def misfit(cls, wrapper: Parameterization) -> str:
        """Return why the optimizer cannot train the factors of a wrapper as its paper says.

        The reason is a clause, "" if it can. Other wrappers beside one that fits are trained by
        AdamW.
        """

    @abstractmethod
    def learn(self, model: nn.Module) -> None:
        """Take from a model what the optimizer has to know of its wrappers."""

    def bind(self, model: nn.Module) -> Self:
        """Tell the optimizer the model that it trains, and return the optimizer.

        Raises:
            UserError: if no wrapper of the model fits, naming why.
        """
        check_fits(type(self), wrappers(model))
        self.learn(model)
        self._model = model
        return self

    def state_numbers(self, model: nn.Module) -> int:
        """Return how many numbers the state of a model's trained parameters has.

        It is told from shapes alone, so that the model may be on the meta device. By default each
        parameter has two.
        """
        return sum(2 * p.numel() for p in model.parameters() if p.requires_grad)

    def require_model(self) -> None:
        """Refuse a step before the model is known."""
        if self._model is None:
            name = type(self).__name__
            raise UserError(
                f"{name} has parameters and does not know their adapters: give it the model, "
                f"{name}(model, lr=...), or call optimizer.bind(model) before the first step."
            )


def check_fits(optimizer: type[ModelOptimizer], candidates: Iterable[Parameterization]) -> None:
    """Check that an optimizer fits a wrapper of a model.

    Raises:
        UserError: naming the methods, why none fits, and what to use.
    """
    reasons: dict[str, str] = {}
    for wrapper in candidates:
        reason = optimizer.misfit(wrapper)
        if not reason:
            return
        reasons.setdefault(type(wrapper).__name__, reason)
    name = optimizer.__name__
    if not reasons:
        raise UserError(f"{name} trains adapters, and the model has none: use torch.optim.AdamW.")
    why = "; ".join(f"{method} {reason}" for method, reason in reasons.items())
    raise UserError(
        f"{name} does not go with this model: {why}. Use torch.optim.AdamW, or a method such as "
        f"LoRA."
    )


def bind(optimizer: Any, model: nn.Module, lora_plus_ratio: float = 1.0) -> None:
    """Tell an optimizer its model, if it is one that asks for it. Others are left alone.

    Args:
        optimizer: any optimizer.
        model: the adapted model.
        lora_plus_ratio: ratio of LoRA+ that the groups of the optimizer have already.
    Raises:
        UserError: if no adapter fits, or the optimizer chooses the ratio itself.
    """
    if not isinstance(optimizer, ModelOptimizer):
        return
    if lora_plus_ratio != 1.0 and optimizer.own_rates:
        raise UserError(
            f"{type(optimizer).__name__} balances the learning rates of both factors itself, and "
            f"lora_plus_ratio={lora_plus_ratio} would do it again; leave lora_plus_ratio at 1.0."
        )
    optimizer.bind(model)


def exempt_from_decay(model: nn.Module) -> set[int]:
    """Return the ids of parameters without weight decay.

    These are the tensors that a method lists in `no_decay`, and vectors outside of wrappers.
    """
    exempt = {
        id(getattr(wrapper, name)) for wrapper in wrappers(model) for name in wrapper.no_decay
    }
    in_wrappers = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in in_wrappers and parameter.dim() <= 1:
            exempt.add(id(parameter))
    return exempt


def trained(parameters: Parameters) -> Any:
    """Return what `torch.optim.Optimizer` takes: of a model, groups with and without decay.

    Raises:
        UserError: if nothing in the model trains.
    """
    if not isinstance(parameters, nn.Module):
        return parameters
    exempt = exempt_from_decay(parameters)
    found = [p for p in parameters.parameters() if p.requires_grad]
    if not found:
        raise UserError(
            "Nothing in this model trains: put adapters on it first, adapt(model, ...)."
        )
    decaying = [p for p in found if id(p) not in exempt]
    others = [p for p in found if id(p) in exempt]
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_options(cls: type[ModelOptimizer], **options: Any) -> None:
    """Check the numbers of a constructor by the ranges of the class. None is no number.

    Raises:
        UserError: naming the option, its value and what fits.
    """
    ranges = ranges_of(cls)
    for name, value in options.items():
        members = value if isinstance(value, tuple | list) else [value]
        if name == "betas" and len(members) != 2:
            raise UserError(
                f"betas={value!r} makes no sense. Give two numbers, such as 0.9, 0.999."
            )
        for member in members:
            if member is not None and not isinstance(member, Tensor):
                check_number(name, member, ranges[name])
