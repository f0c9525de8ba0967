"""LoRA+: AdamW with a higher learning rate for the factors that start at zero."""

from typing import Any, ClassVar

import torch
from torch import nn

from adaptrank._errors import UserError
from adaptrank._options import POSITIVE
from adaptrank.axes import rank_axes
from adaptrank.optimizers.model_optimizer import (
    ModelOptimizer,
    Parameters,
    check_options,
    trained,
)
from adaptrank.parameterizations import Parameterization

CLOSING = "closing"
"""Key of a parameter group that says whether its learning rate is still to be multiplied."""


def closing_factors(model: nn.Module) -> set[int]:
    """Return the ids of the closing factors of all axes: B of LoRA, and A over an embedding.

    They are zero in a fresh unit, and are told by the axes, not by their names.
    """
    return {id(slot.tensor) for axis in rank_axes(model).values() for slot in axis.closing()}


def apply_lora_plus(optimizer: torch.optim.Optimizer, ratio: float) -> None:
    """Multiply the learning rate of groups with a true key "closing", and remove the keys.

    A scheduler multiplies the learning rate of each group, so that the ratio stays.
    """
    for group in optimizer.param_groups:
        if group.pop(CLOSING, False):
            group["lr"] = group["lr"] * ratio
            if "initial_lr" in group:
                group["initial_lr"] = group["initial_lr"] * ratio


class LoRAPlus(ModelOptimizer, torch.optim.AdamW):
    """AdamW with lr_B = ratio * lr_A.

    B is the closing factor of an axis, which starts at zero, whatever its name. The task modules
    have the same as a key, `lora_plus_ratio`. The number of groups is doubled: closing factors have
    one of their own. State follows changes of ranks as that of AdamW does.

    Source: arXiv:2402.12354. The ratio of 16 is recalled from secondary sources, some of which say
        24. Take about half of the learning rate of LoRA.
    Args:
        params: a model, or parameters or groups of them, see `ModelOptimizer`.
        lr: learning rate of all other tensors.
        ratio: learning rate of closing factors over that of the others.
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: decay, times lr.
    Raises:
        UserError: for a number out of range, or a model without a closing factor beside another
            trained one.
    """

    source = "arXiv:2402.12354"
    ranges: ClassVar = {"ratio": POSITIVE}
    own_rates = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        ratio: float = 16.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        options["weight_decay"] = weight_decay
        check_options(type(self), ratio=ratio, **options)
        self.ratio = ratio
        torch.optim.AdamW.__init__(self, trained(params), **options)
        self.register_step_pre_hook(_require_model)
        if isinstance(params, nn.Module):
            self.bind(params)

    @classmethod
    def misfit(cls, wrapper: Parameterization) -> str:
        for axis in wrapper.axes:
            *others, (closing, _) = wrapper.axis_tensors(axis)
            tensors = [getattr(wrapper, name) for name, _ in others if name != closing]
            if any(isinstance(tensor, nn.Parameter) for tensor in tensors):
                return ""
        return "has no trained factor beside one that starts at zero"

    def learn(self, model: nn.Module) -> None:
        if self._model is not None:
            return  # the groups are split already
        closing = closing_factors(model)
        groups = []
        for group in self.param_groups:
            for closes in (False, True):
                members = [p for p in group["params"] if (id(p) in closing) is closes]
                if members:
                    groups.append({**group, "params": members, CLOSING: closes})
        if not any(group[CLOSING] for group in groups):
            raise UserError("LoRAPlus was given none of the model's closing factors.")
        self.param_groups = groups
        apply_lora_plus(self, self.ratio)


def _require_model(optimizer: Any, args: Any, kwargs: Any) -> None:
    optimizer.require_model()
