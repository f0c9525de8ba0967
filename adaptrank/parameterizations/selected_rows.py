"""A wrapper that is on for some rows of a batch only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from adaptrank._errors import UserError

if TYPE_CHECKING:
    from adaptrank.parameterizations.wrapper import Wrapper


def check_rows(wrapper: "Wrapper", x: Any) -> None:
    """Refuse an input whose rows are not those of the batch for which rows were selected."""
    assert wrapper.rows is not None
    _, batch = wrapper.rows
    if not isinstance(x, Tensor) or len(x) != batch:
        given = f"{len(x)} rows" if isinstance(x, Tensor) else "more than one tensor"
        raise UserError(
            f"Rows were selected for a batch of {batch}, and this {type(wrapper).__name__} reads "
            f"{given}."
        )


def put_rows(wrapper: "Wrapper", x: Any, y: Tensor) -> Tensor:
    """Return the base's output y with the adapted output in the selected rows."""
    assert wrapper.rows is not None
    rows, _ = wrapper.rows
    if not len(rows):
        return y
    with _other_adapters_off(wrapper):
        adapted = cast(Tensor, wrapper.forward_gated(x[rows]))
    return y.index_copy(0, rows, adapted.to(y.dtype))


@contextmanager
def _other_adapters_off(wrapper: "Wrapper") -> Iterator[None]:
    """Disable nested wrappers of another adapter, and clear the row selection of all."""
    states = [(inner, inner.enabled, inner.rows) for inner in wrapper.nest[:-1]]
    try:
        for inner, enabled, _ in states:
            inner.enabled, inner.rows = enabled and inner.name == wrapper.name, None
        yield
    finally:
        for inner, enabled, rows in states:
            inner.enabled, inner.rows = enabled, rows
