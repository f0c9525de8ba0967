"""Roles of the tensors in an optimizer's state: first moment, copy of the weights, count, ....

A state is carried through a rank change by its role. A state of unknown role is refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserTypeError
from adaptrank.axes.block_quantized import is_quantized, number_of
from adaptrank.axes.quantized_tensors import dequantized, is_sharded, misfit_of_kind

Optimizers = Iterable[torch.optim.Optimizer]


class Role(Enum):
    """Relation of a state tensor to the units of its parameter."""

    FIRST_MOMENT = "first moment"
    """Running mean or sum of gradients. It is zero in a fresh and in a closed unit."""
    SECOND_MOMENT = "second moment"
    """Size of the gradients. A fresh unit gets the mean of the others."""
    WEIGHT_COPY = "weight copy"
    """Values of the parameter, now or before. A fresh unit gets its own fresh values."""
    ROW_MOMENT = "row moment"
    """Second moment summed over the last dimension, which the state has not."""
    COLUMN_MOMENT = "column moment"
    """Second moment summed over the last dimension but one, which the state has not."""
    COUNT = "count"
    """A number for the whole parameter, such as its steps. It stays as it is."""
    OWN = "own"
    """Values of any shape that the optimizer itself carries through a change. Its method
    `follow` is told of the change (see `axes.Follower`)."""


def _roles(role: Role, *keys: str) -> dict[str, Role]:
    return dict.fromkeys(keys, role)


STATE_ROLES: dict[str, Role] = {
    **_roles(
        Role.FIRST_MOMENT,
        "exp_avg",
        "momentum_buffer",
        "grad_avg",
        "velocity",
        "momentum",
        "m",
        "s",
        "exp_avg_slow",
        "exp_avg_fast",
        "exp_avg_diff",
        "neg_pre_grad",
        "previous_grad",
        "pre_grad",
        "prev_grad",
        "grad_ma",
        "m1_m2",
        "state1",
    ),
    **_roles(
        Role.SECOND_MOMENT,
        "exp_avg_sq",
        "max_exp_avg_sq",
        "square_avg",
        "sum",
        "exp_inf",
        "acc_delta",
        "v",
        "nu",
        "exp_avg_var",
        "max_exp_avg_var",
        "hessian",
        "grad_sum_sq",
        "variance_ma",
        "max_variance_ma",
        "exp_avg_lr",
        "state2",
    ),
    **_roles(
        Role.WEIGHT_COPY,
        "z",
        "x",
        "y",
        "x0",
        "p0",
        "ax",
        "slow",
        "slow_buffer",
        "slow_param",
        "slow_params",
        "slow_weight",
        "slow_weights",
        "lookahead_params",
        "cached_params",
        "anchor",
        "average",
        "ema",
        "ema_param",
        "param_ema",
        "shadow",
        "backup",
        "master",
        "master_param",
        "master_weight",
        "fp32_param",
        "param_copy",
        "weight_copy",
        "initial_param",
    ),
    **_roles(Role.ROW_MOMENT, "exp_avg_sq_row", "exp_avg_res_row"),
    **_roles(Role.COLUMN_MOMENT, "exp_avg_sq_col", "exp_avg_res_col"),
    **_roles(Role.COUNT, "step", "RMS", "mu_product", "eta", "mu", "unorm_vec", "n", "k"),
}
"""Key of an optimizer's state -> role. Add the keys of an optimizer of your own here."""

WITHOUT_UNITS = (None, Role.COUNT, Role.OWN)
"""Roles of states that nothing here carries unit by unit. None is an unknown role."""

SIZES_IN_STATE1 = frozenset({"rmsprop", "adagrad"})
"""Optimizers of bitsandbytes, by `optimizer_name`, whose only state is a second moment."""

SUPPORTED = ("Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax")
"""PyTorch's optimizers whose state follows a rank."""

UNSUPPORTED = ("Rprop", "ASGD", "LBFGS", "Adafactor", "SparseAdam", "Muon")
"""Optimizers that keep state of another form, or scale their steps by it."""


def role_of(optimizer: torch.optim.Optimizer, key: str) -> Role | None:
    """Return the role of a state by its key, or None if it is unknown.

    An optimizer may declare the roles of its keys in an attribute `roles`.
    """
    declared: Mapping[str, Role] = getattr(optimizer, "roles", {})
    if key in declared:
        return declared[key]
    name = getattr(optimizer, "optimizer_name", None)
    if key == "state1" and name in SIZES_IN_STATE1:
        return Role.SECOND_MOMENT
    return STATE_ROLES.get(key)


def with_inner(optimizers: Optimizers) -> Iterator[torch.optim.Optimizer]:
    """Yield optimizers, and those that they wrap, each state once.

    A wrapper that shows the state of what it wraps is left out, unless it carries that state.
    """
    seen: set[int] = set()
    queue = list(optimizers)
    while queue:
        optimizer = queue.pop(0)
        inner = [value for value in vars(optimizer).values() if _is_optimizer(value)]
        shows_inner = any(_state_id(value) == _state_id(optimizer) for value in inner)
        is_mere_wrapper = shows_inner and not hasattr(optimizer, "follow")
        if _state_id(optimizer) not in seen and not is_mere_wrapper:
            seen.add(_state_id(optimizer))
            yield optimizer
        queue += [value for value in inner if _state_id(value) not in seen]


def _state_id(optimizer: torch.optim.Optimizer) -> int:
    """Return the identity of an optimizer's state, or its own if it has none."""
    return id(getattr(optimizer, "state", optimizer))


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer)


def states_of(tensor: Tensor, optimizers: Optimizers) -> Iterator[tuple[str, Role, Tensor]]:
    """Yield (key, role, state) of every state that has the shape of the tensor.

    Raises:
        UserTypeError: if a state is quantized, where elements cannot be changed one by one.
    """
    for optimizer in with_inner(optimizers):
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            role = role_of(optimizer, key)
            if role in WITHOUT_UNITS or not isinstance(value, Tensor):
                continue
            if is_quantized(state, key) or dequantized(value) is not value:
                raise UserTypeError(
                    f"{type(optimizer).__name__} keeps {key!r} quantized, and this allocator "
                    f"changes the state of single units; use {', '.join(SUPPORTED[:2])} or the "
                    "32-bit form of the optimizer."
                )
            if value.shape == tensor.shape:
                assert role is not None
                yield key, role, value


def optimized_tensors(optimizers: Optimizers) -> list[Tensor]:
    """Return the tensors of optimizers and of the optimizers inside of them."""
    tensors: list[Tensor] = []
    for optimizer in [*optimizers, *with_inner(optimizers)]:
        for group in optimizer.param_groups:
            tensors += group["params"]
    return tensors


def holds(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> bool:
    """Return whether an optimizer moves one of these tensors."""
    ids = {id(tensor) for tensor in tensors}
    return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])


def check_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor] | None = None
) -> None:
    """Refuse an optimizer whose state cannot follow a rank change.

    Some of PyTorch's optimizers are refused by name. All are judged by their state: each tensor in
    it must have a known role, a shape that fits the role, and elements that can be moved. An
    optimizer has no state before its first step, so it has to be checked again after it.

    Args:
        optimizer: the optimizer.
        tensors: tensors whose state is judged. None means all.
    Raises:
        TypeError: names the optimizer, the state, and the optimizers that work.
    """
    tensors = None if tensors is None else list(tensors)
    for each in with_inner([optimizer]):
        reason = "" if _is_refused(each) else misfit_of_state(each, tensors)
        if reason is None:
            reason = _misfit_of_kinds(each, tensors)
        if reason is None:
            continue
        why = f" ({reason})" if reason else ""
        advice = f"; use {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]} where ranks move"
        if reason and "unknown role" in reason:
            advice += ", or name the role in adaptrank.axes.STATE_ROLES"
        raise UserTypeError(
            f"{type(each).__name__} keeps state that cannot follow a rank{why}{advice}."
        )


def _misfit_of_kinds(
    optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor] | None
) -> str | None:
    """Describe a parameter or a state whose elements cannot be moved, or return None."""
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    if tensors is not None:
        ids = {id(tensor) for tensor in tensors}
        moved = [p for p in moved if id(p) in ids]
    if any(is_sharded(p) for p in moved):
        return "its parameters are sharded over processes, and an adapter has to stay whole"
    if getattr(optimizer, "is_paged", False) and any(p.device.type != "cpu" for p in moved):
        return "its state is in paged memory; take the form without Paged in its name"
    for parameter in moved:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            role = role_of(optimizer, key)
            has_units = isinstance(value, Tensor) and value.dim() and role not in WITHOUT_UNITS
            if not has_units or is_quantized(state, key):
                continue
            if reason := misfit_of_kind(value):
                return f"its {key!r} {reason}"
    return None


def _is_refused(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is refused by its class. Adafactor of transformers is known."""
    if not hasattr(optimizer, "state"):
        # torchao's CPU offload trains copies of the parameters, which nothing here can find.
        return True
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("transformers."):
            return False
        if cls.__name__ in UNSUPPORTED:
            return True
    return False


def misfit_of_state(
    optimizer: torch.optim.Optimizer,
    tensors: Iterable[Tensor] | None = None,
    known_roles_only: bool = False,
) -> str | None:
    """Describe a state without a known role, or whose shape does not fit its role.

    Args:
        optimizer: the optimizer.
        tensors: tensors whose state is judged. None means all.
        known_roles_only: whether to leave out states of unknown role.
    Returns:
        A clause without parentheses, or None if all states fit.
    """
    ids = None if tensors is None else {id(tensor) for tensor in tensors}
    states: Mapping[Any, Any] = getattr(optimizer, "state", {})
    for parameter, state in states.items():
        if not isinstance(parameter, Tensor):
            if not known_roles_only and _has_tensors(state):
                return f"its state {parameter!r} belongs to no parameter"
            continue
        if ids is not None and id(parameter) not in ids:
            continue
        for key in state:
            reason = _misfit(optimizer, parameter, state, key)
            if reason and not (known_roles_only and role_of(optimizer, key) is None):
                return reason
    return None


def _misfit(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Any], key: str
) -> str | None:
    """Describe why one state cannot follow, or return None."""
    value, role = state[key], role_of(optimizer, key)
    if role is Role.OWN:
        return None
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        return f"its {key!r} is a {kind} of tensors" if _has_tensors(value) else None
    is_number = value.numel() <= 1 and (role in (None, Role.COUNT) or not value.dim())
    if is_number or (is_quantized(state, key) and number_of(state, key) is None):
        return None
    # 8-bit codes are read block by block, in the parameter's own shape only.
    shapes = fitting_shapes(parameter, role)[: 1 if number_of(state, key) else None]
    if value.shape not in shapes:
        return (
            f"its {key!r} has shape {tuple(value.shape)} for a parameter {tuple(parameter.shape)}"
        )
    unknown = role is None or role is Role.COUNT
    return f"its {key!r} has an unknown role" if unknown else None


def fitting_shapes(parameter: Tensor, role: Role | None) -> list[torch.Size]:
    """Return the shapes that a state of a role may have."""
    shape = parameter.shape
    if role is Role.ROW_MOMENT:
        return [shape[:-1]]
    if role is Role.COLUMN_MOMENT:
        return [shape[:-2] + shape[-1:]]
    if role is Role.FIRST_MOMENT:
        # AdEMAMix stacks a fast and a slow one.
        return [shape, torch.Size([2, *shape])]
    return [shape]


def _has_tensors(value: Any) -> bool:
    """Return whether a value holds a tensor with more than one element, at any depth."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, Mapping):
        return any(_has_tensors(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(_has_tensors(entry) for entry in value)
    return False
