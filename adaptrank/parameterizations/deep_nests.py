"""Nests of many wrappers, such as hundreds of adapters side by side, without a recursion over them.

A nest of a few wrappers is computed by recursion: each wrapper calls its base. Wrappers that only
add to the output of their base need none, whatever their number. Neither does a dense weight, which
is computed from the inside out. For the rest Python is allowed to recurse as deep as the nest is.
"""

import sys
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from adaptrank.parameterizations.formula import dense_weight

if TYPE_CHECKING:
    from adaptrank.parameterizations.base import Parameterization

FEW_WRAPPERS = 16
"""Depth up to which a nest is computed by recursion."""

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
"""Names of torch's hooks on every module. torch 2.6 has no function that looks at all of them."""

_FRAMES_OF_A_LEVEL = 16
_FRAMES_OF_THE_REST = 2000


class _Structure:
    """The version of all nests: another object as soon as a wrapper gets another base."""

    version = object()


_structure = _Structure()


def nests_changed() -> None:
    """Forget the innermost layers that wrappers remember, as a wrapper gets another base."""
    _structure.version = object()


def find_innermost(outermost: nn.Module) -> nn.Module:
    """Return the layer under all wrappers.

    With hundreds of adapters a walk takes a while, so each wrapper remembers the last one.
    """
    wrapper = last = outermost
    # `isinstance` of an abstract class is slow.
    while getattr(type(wrapper), "wraps_a_base", False):
        found = vars(wrapper).get("_end_of_nest")
        if found is not None and found[0] is _structure.version:
            last = found[1]
            break
        last, wrapper = wrapper, cast(nn.Module, wrapper._modules["base"])
    vars(outermost)["_end_of_nest"] = (_structure.version, last)
    return cast(nn.Module, last._modules["base"])


def allow_recursion(depth: int) -> None:
    """Raise Python's limit for a nest of this depth: copies and printing recurse over it."""
    needed = _FRAMES_OF_THE_REST + _FRAMES_OF_A_LEVEL * depth
    if depth > FEW_WRAPPERS and sys.getrecursionlimit() < needed:
        # In large steps, as each call costs time.
        sys.setrecursionlimit(2 * needed)


def noop_hook(layer: nn.Module, arguments: object) -> None:
    """Do nothing. Any registered hook disables the fused fast path of torch."""


def forward_deep(outermost: "Parameterization", x: Any) -> Any:
    """Compute the output of a nest of many wrappers.

    The nest is walked inwards to the first wrapper that does more than add to the output of its
    base. The changes of the others are then added from the inside out.
    """
    waiting: list[Parameterization] = []
    layer: nn.Module = outermost.innermost
    for wrapper in reversed(outermost.nest):
        is_off = not wrapper.enabled or wrapper.idle
        passes = is_off or wrapper.rows is not None or wrapper.only_adds
        if not passes or (wrapper is not outermost and _is_watched(wrapper)):
            layer = wrapper
            break
        if not is_off:
            waiting.append(wrapper)
    if layer is outermost:
        return outermost.forward_gated(x)
    y = layer(x)
    for wrapper in reversed(waiting):
        y = wrapper.add_to(x, y)
    return y


def _is_watched(wrapper: nn.Module) -> bool:
    """Return whether a hook observes the calls of this wrapper. The no-op hook does not count."""
    pre_hooks = wrapper._forward_pre_hooks.values()
    return bool(
        wrapper._forward_hooks
        or wrapper._backward_hooks
        or wrapper._backward_pre_hooks
        or any(hook is not noop_hook for hook in pre_hooks)
        or any(getattr(torch_module, hooks) for hooks in _GLOBAL_HOOKS)
    )


def dense_deep(nest: "list[Parameterization]") -> Tensor:
    """Return the dense weight of a nest, from the inside out."""
    weight = dense_weight(nest[0])
    for wrapper in nest[1:]:
        # Not as an attribute of the module, which would register a parameter.
        wrapper.__dict__["_given_weight"] = weight
        try:
            weight = dense_weight(wrapper)
        finally:
            del wrapper.__dict__["_given_weight"]
    return weight
