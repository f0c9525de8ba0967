"""Parameter groups of an adapted model, learning rates of LoRA+, and fused optimizer steps."""

from typing import Any

import torch
from torch import nn

from adaptrank._errors import UserError
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import adapter_parameters, wrappers


def parameter_groups(model: nn.Module, lora_plus_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and, for LoRA+, by closing factor.

    Exempt from decay are the tensors that a method lists in `no_decay`, and vectors outside of
    wrappers (norms, biases). Each group has a key "closing", true for closing factors under a
    LoRA+ ratio, which `apply_lora_plus` reads and removes.

    Raises:
        UserError: if a LoRA+ ratio is requested and no method has a closing factor, or if no layer
            has a unit and nothing else trains.
    """
    closing = {id(slot.tensor) for axis in rank_axes(model).values() for slot in axis.closing()}
    has_ratio = lora_plus_ratio != 1.0
    if has_ratio and not closing:
        raise UserError(
            "lora_plus_ratio needs a method with a rank axis, such as LoRA. Leave it at 1.0 here."
        )
    exempt = _ids_exempt_from_decay(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        decays = id(parameter) not in exempt
        is_closing = has_ratio and id(parameter) in closing
        groups.setdefault((decays, is_closing), []).append(parameter)
    trained = [parameter for group in groups.values() for parameter in group]
    if trained and not any(parameter.numel() for parameter in trained):
        raise UserError(
            "No layer has a unit, so that nothing trains: give some layers 1 or more in "
            "rank_pattern."
        )
    return [_group(parameters, *kind) for kind, parameters in groups.items()]


def _ids_exempt_from_decay(model: nn.Module) -> set[int]:
    """Return the ids of parameters without weight decay."""
    exempt = {
        id(getattr(wrapper, name)) for wrapper in wrappers(model) for name in wrapper.no_decay
    }
    in_wrappers = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in in_wrappers and parameter.dim() <= 1:
            exempt.add(id(parameter))
    return exempt


def _group(parameters: list[nn.Parameter], decays: bool, is_closing: bool) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "closing": is_closing}
    if not decays:
        group["weight_decay"] = 0.0
    return group


def apply_lora_plus(optimizer: torch.optim.Optimizer, ratio: float) -> None:
    """Multiply the learning rate of closing factors by `ratio` (LoRA+, arXiv:2402.12354).

    The optimizer is one over `parameter_groups`. Their key "closing" is removed.
    """
    for group in optimizer.param_groups:
        if group.pop("closing"):
            group["lr"] = group["lr"] * ratio


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
