"""Measures of a training step: time, kernel launches, synchronizations, and memory."""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
"""Beginnings of the names of calls that launch a kernel. Triton's kernels take the second one."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = "aten::_local_scalar_dense"
"""The operation that takes a number from the device. It waits for the stream as well."""

NO_WORK = (
    "Activity Buffer",
    "Buffer Flush",
    "Command Buffer",
    "Context Sync",
    "Event Sync",
    "Instrumentation",
    "Lazy Function",
    "Resource",
    "Runtime Triggered",
    "Stream Sync",
    "Stream Wait",
)
"""Beginnings of the names of device events that are waits, or work of the profiler itself."""


@dataclass(frozen=True)
class Counts:
    """Work of a step on the device, as the profiler saw it.

    Args:
        launches: kernels that the host launched.
        waits: calls of the host that wait for the device.
        reads: numbers that the host took from the device.
        busy_ms: milliseconds of kernels and copies.
    """

    launches: int
    waits: int
    reads: int
    busy_ms: float

    @property
    def syncs(self) -> int:
        """Synchronizations: a read of a number is one wait, which some versions do not show."""
        return max(self.waits, self.reads)

    def __sub__(self, other: "Counts") -> "Counts":
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: max(mine[name] - theirs[name], 0) for name in mine})


Seen = tuple[str, bool, float]
"""An event of the profiler: its name, whether it ran on the device, milliseconds."""


def count(events: Iterable[Seen]) -> Counts:
    """Return the counts of the profiler's events."""
    launches = waits = reads = 0
    busy = 0.0
    for name, on_device, milliseconds in events:
        if on_device:
            busy += 0.0 if name.startswith(NO_WORK) else milliseconds
        elif name.startswith(LAUNCHES):
            launches += 1
        elif name.startswith(WAITS):
            waits += 1
        elif name == READS:
            reads += 1
    return Counts(launches, waits, reads, busy)


def seen(profiler: profile) -> list[Seen]:
    """Return the events of a profile, without the names that the host gives to parts of it."""
    raw = profiler.profiler.kineto_results.events()
    return [
        (event.name(), "CUDA" in str(event.device_type()), event.duration_ns() / 1e6)
        for event in raw
        if not event.is_user_annotation()
    ]


class Device:
    """A device that steps are measured on. On a CPU there are no launches and no peak.

    Args:
        device: a CUDA device, or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.activities = [ProfilerActivity.CPU]
        if self.is_cuda:
            self.activities.append(ProfilerActivity.CUDA)
        self.own_counts = Counts(0, 0, 0, 0.0)
        # What the profiler and the last synchronization add to every profile.
        self.own_counts = self.counts(lambda: None)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, step: Callable[[], object], times: int = 1) -> float:
        """Return the seconds of a step, as the mean of some steps without a wait between them."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            step()
        self.synchronize()
        return (time.perf_counter() - start) / times

    def counts(self, step: Callable[[], object]) -> Counts:
        """Return the counts of a step."""
        self.synchronize()
        with profile(activities=self.activities) as profiler:
            step()
            self.synchronize()
        return count(seen(profiler)) - self.own_counts

    def allocated(self) -> int:
        """Return the bytes of all tensors on the device."""
        if not self.is_cuda:
            return 0
        gc.collect()
        return torch.cuda.memory_allocated(self.device)

    def peak(self, step: Callable[[], object]) -> int:
        """Return the bytes that a step takes beside those that are there before it."""
        if not self.is_cuda:
            step()
            return 0
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def measured(self, value: float) -> float | None:
        """Return a figure that only a CUDA device has, None on a CPU."""
        return round(value, 3) if self.is_cuda else None

    def release(self) -> None:
        """Give cached memory back to the device."""
        if self.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()


def describe(counts: Counts, device: Device) -> dict[str, Any]:
    """Return the counts for the results, None where the device has none."""
    return {
        "launches": device.measured(counts.launches),
        "syncs": device.measured(counts.syncs),
        "busy_ms": device.measured(counts.busy_ms),
    }


def one_line(error: Exception) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
