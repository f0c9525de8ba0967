"""Training steps of every method beside the frozen floor and HF PEFT: eager, or compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import common
from torch import nn

from adaptrank import compile_blocks
from gpu_parts.clock import Deadline
from gpu_parts.measures import MIB, Device, describe, one_line
from gpu_parts.models import Graphs, Step, Workload, frozen, variant
from gpu_parts.settings import PEFT, Settings, Size

BUILDING = 0.65
"""Share of a part's time after which no further variant is built, since rounds need the rest."""
Rows = dict[str, dict[str, Any]]


class Session:
    """The variants of one size on one device.

    Args:
        size: shapes of the model and of its input.
        device: where to measure.
        deadline: when to stop.
        prepare: what is done to a variant before it is measured.
    """

    def __init__(
        self,
        size: Size,
        device: Device,
        deadline: Deadline,
        prepare: Callable[[nn.Module], object] = lambda model: None,
    ) -> None:
        self.device, self.deadline, self.prepare = device, deadline, prepare
        self.base = frozen(size, device.device)
        self.workload = Workload(size, device.device)
        self.rows: Rows = {}
        self.left_out: list[str] = []
        self.slowest = 0.0

    def begin(self, name: str) -> Step | None:
        """Build a variant and measure its first steps. None if it fails or time is short."""
        if not self.deadline.allows(self.slowest):
            self.left_out.append(name)
            return None
        begin = self.deadline.used()
        try:
            step = self._first_steps(name)
        except Exception as error:
            self.rows[name] = {"failed": one_line(error)}
            step = None
            self.device.release()
        self.slowest = max(self.slowest, self.deadline.used() - begin)
        return step

    def _first_steps(self, name: str) -> Step:
        device = self.device
        before = device.allocated()
        model = variant(name, self.base)
        self.prepare(model)
        step = self.workload.step(model)
        first = device.seconds(step)
        step()
        self.workload.x.grad = None
        own = device.allocated() - before
        peak = own + device.peak(step)
        counts = device.counts(step)
        self.rows[name] = {
            "first_s": round(first, 2),
            "peak_mib": device.measured(peak / MIB),
            **describe(counts, device),
        }
        return step


def eager(
    size: Size,
    device: Device,
    deadline: Deadline,
    settings: Settings,
    names: Sequence[str],
    prepare: Callable[[nn.Module], object] = lambda model: None,
) -> dict[str, Any]:
    """Measure variants in interleaved rounds. All of them are on the device at once."""
    session = Session(size, device, deadline.part(BUILDING), prepare)
    steps = {name: step for name in names if (step := session.begin(name)) is not None}
    seconds = common.interleaved(
        {name: timed(step, device, settings.times) for name, step in steps.items()},
        settings.rounds,
        enough=lambda took: not deadline.allows(took),
    )
    for name in steps:
        row = session.rows[name]
        row["ms"] = common.quartiles([1000 * s for s in seconds[name]])
        for over, key in (("floor", "floor"), (PEFT + name, "peft")):
            if over in seconds:
                row[key] = common.ratios(seconds, name, over)
    rounds = len(next(iter(seconds.values()), []))
    return {"size": str(size), "rounds": rounds, "rows": session.rows, "left_out": session.left_out}


def timed(step: Step, device: Device, times: int) -> Step:
    """Return a function that makes some steps and returns the seconds of one."""
    return lambda: device.seconds(step, times)


def compiled(
    size: Size,
    device: Device,
    deadline: Deadline,
    settings: Settings,
) -> dict[str, Any]:
    """Measure variants with compiled blocks one after the other.

    What PyTorch compiled for a variant is dropped before the next one. Otherwise the two would
    share a cache, and sizes that differ between them would become dynamic in both.
    """
    options = settings.options
    session = Session(size, device, deadline, lambda model: compile_blocks(model, **options))
    for name in settings.compiled:
        graphs = Graphs()
        step = session.begin(name)
        if step is None:
            continue
        seconds = [device.seconds(step, settings.times) for _ in range(settings.rounds)]
        row = session.rows[name]
        row["ms"] = common.quartiles([1000 * s for s in seconds])
        row["graphs"] = graphs.made()
        floor = session.rows.get("floor", {}).get("ms")
        if floor is not None:
            row["over_floor"] = round(row["ms"]["median"] / floor["median"], 4)
        del step
        device.release()
    Graphs()
    return {"size": str(size), "rows": session.rows, "left_out": session.left_out}
