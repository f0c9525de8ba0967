"""A warning where a trainer clips gradients beside an optimizer that clips by itself."""

import logging
from typing import Any

log = logging.getLogger("adaptrank")


def warn_of_clipping(optimizer: Any, option: str, value: float | None) -> None:
    """Warn if both clip. Clipped gradients of factors depend on how their product is split.

    Args:
        optimizer: any optimizer. One that clips by itself has a true attribute `clips`.
        option: the trainer's option.
        value: its value, the largest norm of all gradients; 0 or None is off.
    """
    if value and getattr(optimizer, "clips", False):
        log.warning(
            "%s clips by itself (clip), and %s=%s clips the gradients of both factors before it, "
            "which depend on how the product is split. Set %s to 0.",
            type(optimizer).__name__,
            option,
            value,
            option,
        )
