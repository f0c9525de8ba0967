"""Replace the forward of modules for a moment. This is the only place in the room that does so.

There are two callers:

- `body_and_head.separable_body` replaces the forward of a model's body during one probe of the
  model with three tokens. The probe happens once per model, in the first step.
- `padding_free.hidden_states` replaces the forward of active dropouts during one call of the body.

In both cases the earlier forward is back before the caller returns, also after an error. Forward
hooks cannot do this: they run beside a forward, and never instead of it. A body would compute
everything, and a dropout would draw random numbers that change every later draw.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(replacements: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Within the block, let modules call other functions in place of their forward.

    On exit each module has the forward of before: its class's, or a forward that was set on the
    module itself.

    Args:
        replacements: pairs of a module and the function that it calls.
    """
    earlier: list[tuple[nn.Module, Forward | None]] = []
    try:
        for module, forward in replacements:
            earlier.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own_forward in reversed(earlier):
            if own_forward is None:
                del module.forward
            else:
                module.forward = own_forward
