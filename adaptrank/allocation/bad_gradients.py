"""Optimizer steps whose gradients are not finite: told, undone and counted on the device.

Whether a gradient is finite is known on its device. A step that asked for it would wait for all
work before it. So the answer stays there: the state of an allocator is updated in any case, and
gets its values from before where the gradients were not finite.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from adaptrank._errors import RunError
from adaptrank.allocation.state import TrackedTensors

MOST_BAD_STEPS = 50
"""Optimizer steps in a row with gradients that are not finite, after which a run stops."""


def all_finite(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return whether all values are finite, (), on the device, or None if there is no tensor."""
    if not tensors:
        return None
    norms = torch._foreach_norm(list(tensors))
    device = norms[0].device
    return torch.isfinite(torch.stack([norm.to(device) for norm in norms]).sum())


class BadSteps:
    """Number of steps in a row whose gradients were not finite, counted on the device.

    The device is read as often as the number may have become too large: at every fiftieth step of
    a healthy run. A run with too many bad steps stops at the last of them.

    Args:
        known: number at the start, from a checkpoint.
    """

    def __init__(self, known: int = 0) -> None:
        self._known = known
        """Number at the last look."""
        self._steps_since = 0
        self._count: Tensor | None = None

    def note(self, finite: Tensor | None) -> None:
        """Count a step.

        Args:
            finite: whether its gradients were finite, (), or None if it had none.
        Raises:
            RunError: if this is the last of too many steps in a row.
        """
        if finite is None:
            self._known, self._steps_since, self._count = 0, 0, None
            return
        count: Tensor | int = self._known
        if self._count is not None:
            # Layers of a model may lie on several devices.
            count = self._count.to(finite.device)
        count = count + 1
        self._count = finite.logical_not().long() * count
        self._steps_since += 1
        may_be_too_many = self._known + self._steps_since >= MOST_BAD_STEPS
        if may_be_too_many and self.read() >= MOST_BAD_STEPS:
            raise RunError(
                f"Gradients were not finite for {MOST_BAD_STEPS} optimizer steps in a row; "
                f"lower the learning rate."
            )

    def read(self) -> int:
        """Return the number. The device is read if there was a step since the last look."""
        if self._count is not None and self._steps_since:
            self._known, self._steps_since = int(self._count), 0
        return self._known


@contextmanager
def unchanged_unless(finite: Tensor | None, state: TrackedTensors) -> Iterator[None]:
    """Within the block, let the state be updated. Afterwards undo that if `finite` is False.

    A copy of the tensors is kept for the length of the block. That is at the end of an optimizer
    step, where no activation of the model is in memory. Nothing is read from the device unless the
    block removes a tensor, gives it another shape, makes one whose start may depend on gradients,
    or raises. An error is passed on only if the gradients are finite: code may refuse numbers that
    are not.

    Args:
        finite: whether the gradients of the step are finite, (), or None if there are none to
            judge.
        state: state of an allocator.
    """
    if finite is None:
        yield
        return
    before = list(state.updated())
    tensors = [tracked.tensor for _, _, tracked in before]
    shapes = [tensor.shape for tensor in tensors]
    snapshots = _snapshots(tensors, tensors)
    failed = False
    with state.noting_new() as starts:
        try:
            yield
        except Exception:
            if finite:
                raise
            failed = True
    made = [entry for entry in state.items() if id(entry[2]) in starts]
    after = [tracked for _, _, tracked in state.updated() if id(tracked) not in starts]
    same_entries = [id(tracked) for _, _, tracked in before] == list(map(id, after))
    same_tensors = same_entries and all(
        tracked.tensor is tensor and tensor.shape == shape
        for tracked, tensor, shape in zip(after, tensors, shapes, strict=True)
    )
    if same_tensors and not failed and all(map(_is_constant, starts.values())):
        # A start that is expanded from one number may depend on gradients after all.
        first_values = [_finite_part(starts[id(tracked)]) for _, _, tracked in made]
        snapshots += _snapshots([tracked.tensor for _, _, tracked in made], first_values)
        for snapshot in snapshots:
            snapshot.restore_unless(finite)
    elif not finite:
        for key, name, _ in made:
            state.drop(key, name)
        for (key, name, tracked), tensor in zip(before, tensors, strict=True):
            tracked.tensor = tensor
            state.put_back(key, name, tracked)
        for snapshot in snapshots:
            snapshot.restore()


class _Snapshot:
    """Copy of tensors of one device and dtype.

    Args:
        tensors: the tensors.
        values: their values to copy.
    """

    def __init__(self, tensors: list[Tensor], values: list[Tensor]) -> None:
        self._tensors = tensors
        self._shapes = [value.shape for value in values]
        flat = _flatten(values)
        self._flat = flat.clone() if len(values) == 1 else flat

    def restore_unless(self, finite: Tensor) -> None:
        """Restore the values unless `finite`, by few calls and without reading the device."""
        present = _flatten(self._tensors)
        torch.where(finite.to(present.device), present, self._flat, out=present)
        parts = _unflatten_dense_tensors(present, self._tensors)  # type: ignore[no-untyped-call]
        torch._foreach_copy_(self._tensors, parts)

    def restore(self) -> None:
        """Restore shapes and values."""
        parts = torch.split(self._flat, [shape.numel() for shape in self._shapes])
        for tensor, shape, part in zip(self._tensors, self._shapes, parts, strict=True):
            if tensor.shape == shape:
                tensor.copy_(part.view(shape))
            else:
                tensor.data = part.view(shape).clone()


def _flatten(tensors: list[Tensor]) -> Tensor:
    """Return the values of tensors in one, (n,). A single tensor is not copied."""
    return _flatten_dense_tensors(tensors)  # type: ignore[no-any-return, no-untyped-call]


def _snapshots(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> list[_Snapshot]:
    """Return snapshots of all tensors that have elements, one for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, value in zip(tensors, values, strict=True):
        if value.numel():
            of_tensors, of_values = groups.setdefault((tensor.device, tensor.dtype), ([], []))
            of_tensors.append(tensor)
            of_values.append(value)
    return [_Snapshot(*group) for group in groups.values()]


def _finite_part(start: Tensor) -> Tensor:
    """Return the values, with zeros where they are not finite."""
    return torch.where(torch.isfinite(start), start, torch.zeros_like(start))


def _is_constant(start: Tensor) -> bool:
    """Return whether a first value is a number that cannot depend on gradients.

    These are whole numbers, and one number that is expanded without memory, as by `zeros`.
    """
    if not start.is_floating_point():
        return True
    return start.dim() > 0 and not any(start.stride())
