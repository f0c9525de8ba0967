"""Ranges of the whole numbers in buffers."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptrank._errors import UserError

if TYPE_CHECKING:
    from adaptrank.parameterizations.base import Parameterization


def is_index(tensor: Tensor) -> bool:
    """Return whether a tensor holds whole numbers, which mean positions or seeds."""
    has_other_numbers = tensor.is_floating_point() or tensor.is_complex()
    return not has_other_numbers and tensor.dtype is not torch.bool


def check_indices(wrapper: "Parameterization", name: str, values: Tensor, key: str = "") -> None:
    """Refuse whole numbers outside of the range that the method states for them.

    Args:
        wrapper: the wrapper that has the buffer.
        name: name of the buffer.
        values: the values that it is to hold.
        key: name of the values in a file, for the error.
    Raises:
        UserError: names the value and the range, or says that the method states none.
    """
    method, known = type(wrapper).__name__, key or name
    allowed = wrapper.index_ranges().get(name)
    if allowed is None:
        raise UserError(
            f"{known} holds whole numbers, and {method}.index_ranges() does not state their range; "
            f"add {name!r} to it."
        )
    if values.is_meta or not values.numel():
        return
    for value in (int(values.min()), int(values.max())):
        if value not in allowed:
            raise UserError(
                f"{known} of {method} holds {value}, and its values are {allowed.start} to "
                f"{allowed.stop - 1}; the file is damaged, or of another model."
            )
