"""State of an allocator: tensors that follow rank changes, and the progress of the run.

Both are plain values. They are the whole of what a checkpoint holds of an allocator.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptrank.allocation.events import Event
from adaptrank.allocation.plans import Resize
from adaptrank.allocation.schedules import Phases
from adaptrank.axes import RankAxis

Where = int | None | Sequence[tuple[str, int]]
"""Rule by which a tracked tensor follows rank axes.

An integer is the dimension that counts the units of its own axis. None follows no axis. Pairs of
(axis key, dimension) follow several axes.
"""


@dataclass
class Tracked:
    """A tensor and the (axis key, dimension) pairs that it follows."""

    tensor: Tensor
    dims: tuple[tuple[str, int], ...]

    def follow(self, key: str, change: Resize) -> None:
        """Select the kept units of an axis and append zeros for the grown ones."""
        for dim in [dim for axis, dim in self.dims if axis == key]:
            index = torch.tensor(change.keep, dtype=torch.long, device=self.tensor.device)
            kept = self.tensor.detach().index_select(dim, index)
            shape = list(kept.shape)
            shape[dim] = change.grow
            resized = torch.cat([kept, kept.new_zeros(shape)], dim)
            self.tensor = resized.requires_grad_(self.tensor.requires_grad)


class TrackedTensors:
    """State of an allocator: named tensors that follow every rank change.

    A method with more to say about its state derives a class and adds methods that name the
    tensors. The tensors go into the checkpoint, and fresh units start at zero. In a run with
    several processes the checkpoint holds the tensors of the first process, so they must be equal
    on all processes. Values computed from gradients are. Reduce all other values first.
    """

    def __init__(self) -> None:
        self._by_axis: dict[str, dict[str, Tracked]] = {}
        self._starts: dict[int, Tensor] | None = None
        """First values by id of the tracked tensor, of those made within `noting_new`."""

    def __bool__(self) -> bool:
        return any(self._by_axis.values())

    def __iter__(self) -> Iterator[Tracked]:
        for tensors in self._by_axis.values():
            yield from tensors.values()

    def items(self) -> Iterator[tuple[str, str, Tracked]]:
        """Yield (axis key, name, tracked tensor)."""
        for key, tensors in self._by_axis.items():
            for name, tracked in tensors.items():
                yield key, name, tracked

    def track(self, axis: RankAxis, name: str, initial: Tensor, where: Where = 0) -> Tensor:
        """Return the tensor `name` of an axis, and create it from `initial` at the first call.

        Args:
            axis: the axis that owns the tensor.
            name: any name, unique within the axis.
            initial: first value; it is copied.
            where: dimensions that count units; see `Where`.
        """
        tensors = self._by_axis.setdefault(axis.key, {})
        if name not in tensors:
            value = initial.detach().clone(memory_format=torch.contiguous_format)
            tensors[name] = Tracked(value, _dims(axis, where))
            if self._starts is not None:
                self._starts[id(tensors[name])] = initial
        return tensors[name].tensor

    def pop(self, axis: RankAxis, name: str) -> Tensor | None:
        """Remove and return the tensor `name` of an axis, or None if there is no such tensor."""
        tracked = self._by_axis.get(axis.key, {}).pop(name, None)
        return None if tracked is None else tracked.tensor

    def updated(self) -> Iterator[tuple[str, str, Tracked]]:
        """Yield (axis key, name, tracked tensor) of what the update of a step may change: all."""
        return self.items()

    @contextmanager
    def noting_new(self) -> Iterator[dict[int, Tensor]]:
        """Within the block, note the first value of each tensor that is made.

        Yields:
            id of the tracked tensor -> its first value.
        """
        self._starts = {}
        try:
            yield self._starts
        finally:
            self._starts = None

    def put_back(self, key: str, name: str, tracked: Tracked) -> None:
        """Take a tracked tensor again that was removed, or that is there."""
        self._by_axis.setdefault(key, {})[name] = tracked

    def drop(self, key: str, name: str) -> None:
        """Remove the tensor `name` of an axis."""
        self._by_axis.get(key, {}).pop(name, None)

    def follow(self, axis: RankAxis, change: Resize) -> None:
        """Let every tensor follow a rank change of an axis."""
        for tracked in self:
            tracked.follow(axis.key, change)

    def leaves(self) -> list[Tensor]:
        """Return the tensors that gradients reach: trained gates."""
        return [tracked.tensor for tracked in self if tracked.tensor.requires_grad]

    def to(self, device: torch.device) -> None:
        """Move all tensors to a device."""
        for tracked in self:
            tracked.tensor = tracked.tensor.to(device)

    def clear(self) -> None:
        """Forget all tensors."""
        self._by_axis.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors as {axis key: {name: {"tensor", "dims"}}}."""
        stored: dict[str, Any] = {key: {} for key in self._by_axis}
        for key, name, tracked in self.items():
            dims = [list(dim) for dim in tracked.dims]
            stored[key][name] = {"tensor": tracked.tensor, "dims": dims}
        return stored

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take the tensors of a checkpoint."""
        self.clear()
        for key, tensors in stored.items():
            named = self._by_axis.setdefault(key, {})
            for name, entry in tensors.items():
                dims = tuple((axis, dim) for axis, dim in entry["dims"])
                named[name] = Tracked(entry["tensor"], dims)


@dataclass
class Progress:
    """Position of a run, in optimizer steps and in units.

    Args:
        budget: (budget, unit) of the run that the progress belongs to.
        start_sizes: units of each axis when the run began.
        start_total: cost of these units, in the unit of the budget.
        phases: phases of the run, or None before it begins.
        steps_done: optimizer steps so far.
        bad_steps: steps in a row whose gradients were not finite.
        deferred: whether the last event was put off because a score was not a number.
        closed: units of each axis that a plan closed, until the next event.
        events: everything that has happened.
        examples: training batches that scores are computed on, or None before they are read.
    """

    budget: tuple[int | None, str] = (None, "ranks")
    start_sizes: dict[str, int] = field(default_factory=dict)
    start_total: int = 0
    phases: Phases | None = None
    steps_done: int = 0
    bad_steps: int = 0
    deferred: bool = False
    closed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    examples: list[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the progress in types that `torch.load(weights_only=True)` accepts."""
        phases = self.phases
        return {
            "budget": list(self.budget),
            "start": self.start_sizes,
            "start_total": self.start_total,
            "phases": phases and [phases.total, phases.warmup, phases.final, phases.every],
            "steps_done": self.steps_done,
            "bad_steps": self.bad_steps,
            "owed": self.deferred,
            "closed": {key: list(units) for key, units in self.closed.items()},
            "events": self.events,
            "examples": self.examples if _is_plain(self.examples) else None,
        }

    @classmethod
    def from_state_dict(cls, stored: Mapping[str, Any]) -> "Progress":
        """Build the progress that a checkpoint holds."""
        budget, unit = stored["budget"]
        return cls(
            budget=(budget, unit),
            start_sizes=stored["start"],
            start_total=stored["start_total"],
            phases=Phases(*stored["phases"]) if stored["phases"] else None,
            steps_done=stored["steps_done"],
            bad_steps=stored["bad_steps"],
            deferred=stored["owed"],
            closed={key: tuple(units) for key, units in stored["closed"].items()},
            events=list(stored["events"]),
            examples=stored["examples"],
        )


def _dims(axis: RankAxis, where: Where) -> tuple[tuple[str, int], ...]:
    if where is None:
        return ()
    if isinstance(where, int):
        return ((axis.key, where),)
    return tuple(where)


def _is_plain(value: Any) -> bool:
    """Return whether a checkpoint that is loaded with `weights_only=True` can hold the value."""
    if type(value) is dict:
        keys = all(isinstance(key, str | int) for key in value)
        return keys and all(map(_is_plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | str | int | float | bool)
