"""Parameter groups of an adapted model, their learning rates, and fused optimizer steps."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from adaptrank._errors import UserError
from adaptrank.modules.learning_rates import check_ratio, match_rates, rates_of_model
from adaptrank.optimizers import apply_lora_plus, bind, closing_factors, exempt_from_decay

OTHERS = "others"
"""Name of the groups that have the optimizer's own rate, where other groups have names."""


class GroupKind(NamedTuple):
    """Properties that the tensors of a parameter group have in common.

    Args:
        key: key of `learning_rates` that decides the rate, or None for the optimizer's own rate.
        decays: whether weight decay applies.
        is_closing: whether they are closing factors, whose rate LoRA+ multiplies.
    """

    key: str | None
    decays: bool
    is_closing: bool


def build_optimizer(
    model: nn.Module,
    make: Callable[[Iterable[Any]], torch.optim.Optimizer],
    lora_plus_ratio: float = 1.0,
    learning_rates: Mapping[str, Any] | str | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer over `parameter_groups`, with fused steps where it can.

    Args:
        model: the adapted model.
        make: parameter groups -> optimizer, such as a partial with its learning rate.
        lora_plus_ratio: rate of closing factors over the rate that they would have.
        learning_rates: own rates, as in `parameter_groups`.

    Raises:
        UserError: as in `parameter_groups`, or if the optimizer takes no rate for each group.
    """
    groups = parameter_groups(model, lora_plus_ratio, learning_rates)
    optimizer = _make(make, groups) if learning_rates else make(groups)
    fuse(optimizer)
    apply_lora_plus(optimizer, lora_plus_ratio)
    bind(optimizer, model, lora_plus_ratio)
    return optimizer


def _make(
    make: Callable[[Iterable[Any]], torch.optim.Optimizer], groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Build an optimizer whose groups have rates, and refuse one that would not follow them."""
    try:
        optimizer = make(groups)
    except ValueError as error:
        if "group" not in str(error):
            raise
        raise UserError(
            f"learning_rates needs an optimizer with parameter groups, and this one says: {error}. "
            f"Take another, such as torch.optim.AdamW, or leave learning_rates out."
        ) from None
    sets_its_own = any(group.get("relative_step") for group in optimizer.param_groups)
    if sets_its_own or "lr" not in optimizer.defaults:
        option = " with relative_step=True" if sets_its_own else ""
        raise UserError(
            f"{type(optimizer).__name__}{option} sets its own learning rate, and learning_rates "
            f"gives some. Leave learning_rates out, or take another optimizer."
        )
    return optimizer


def parameter_groups(
    model: nn.Module,
    lora_plus_ratio: float = 1.0,
    learning_rates: Mapping[str, Any] | str | None = None,
) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate, by weight decay and, for LoRA+, by closing.

    Exempt from decay are the tensors that a method lists in `no_decay`, and vectors outside of
    wrappers (norms, biases). The list goes into any optimizer of PyTorch, and so into the
    `optimizers` of transformers' Trainer.

    Args:
        model: the adapted model.
        lora_plus_ratio: rate of closing factors over the rate that they would have. Unless it is 1,
            the groups have a key "closing", which `apply_lora_plus` reads and removes.
        learning_rates: {key: rate} in place of the optimizer's rate. A key is a tensor ("LoRA.B"),
            a method ("LoRA"), an adapter by its name, or a kind of tensor ("scales"). Outside of
            wrappers it is the path or the last name of a module that trains whole, "head" or
            "modules". The first of these that names a tensor decides. The groups then have names.
            "studied" gives each method the rate that its study chose.

    Raises:
        UserError: for a key that names nothing, if a LoRA+ ratio is requested and no method has a
            closing factor, or if no layer has a unit and nothing else trains.
    """
    rates = rates_of_model(model, learning_rates)
    has_ratio = lora_plus_ratio != 1.0
    closing = closing_factors(model) if has_ratio else set()
    if has_ratio and not closing:
        raise UserError(
            "lora_plus_ratio needs a method with a rank axis, such as LoRA. Leave it at 1.0 here."
        )
    keys = match_rates(model, rates)
    check_ratio(model, keys, closing)
    kinds = _grouped(model, keys, closing)
    groups = []
    for kind, parameters in kinds.items():
        group: dict[str, Any] = {"params": parameters}
        if has_ratio:
            group["closing"] = kind.is_closing
        if not kind.decays:
            group["weight_decay"] = 0.0
        if rates:
            group["name"] = _name(kind, kinds)
        if kind.key is not None:
            group["lr"] = rates[kind.key]
        groups.append(group)
    return groups


def _grouped(
    model: nn.Module, keys: Mapping[int, str], closing: Collection[int]
) -> dict[GroupKind, list[nn.Parameter]]:
    """Return the trained parameters of each group, in the order of the model.

    Args:
        model: the adapted model.
        keys: id of a parameter -> key that decides its rate.
        closing: ids of the parameters whose rate LoRA+ multiplies.

    Raises:
        UserError: if no layer has a unit and nothing else trains.
    """
    exempt = exempt_from_decay(model)
    groups: dict[GroupKind, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = id(parameter)
            kind = GroupKind(keys.get(name), name not in exempt, name in closing)
            groups.setdefault(kind, []).append(parameter)
    trained = [parameter for group in groups.values() for parameter in group]
    if trained and not any(parameter.numel() for parameter in trained):
        raise UserError(
            "No layer has a unit, so that nothing trains: give some layers 1 or more in "
            "rank_pattern."
        )
    return groups


def _name(kind: GroupKind, kinds: Collection[GroupKind]) -> str:
    """Return the name of a group: its key, and what tells it from other groups of this key."""
    name = OTHERS if kind.key is None else kind.key
    if kind.is_closing:
        name += "-closing"
    if not kind.decays and kind._replace(decays=True) in kinds:
        name += "-no_decay"
    return name


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of PyTorch step all tensors in one call, where it can.

    Groups for which the user chose an implementation are left alone.
    """
    for group in optimizer.param_groups:
        if _is_undecided(group) and _can_be_fused(group):
            group["fused"] = True


def _is_undecided(group: dict[str, Any]) -> bool:
    """Tell whether the optimizer knows `fused`, and no implementation was chosen."""
    knows_fused = "fused" in group
    return knows_fused and group["fused"] is None and group.get("foreach") is None


def _can_be_fused(group: dict[str, Any]) -> bool:
    if group.get("differentiable") or group.get("capturable"):
        return False
    return all(
        parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
        for parameter in group["params"]
    )


__all__ = ["apply_lora_plus", "fuse", "parameter_groups"]
