"""Ranks that fall from 64 to 8 during training: memory, time, and recompilations."""

import statistics
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import common
import torch
from torch import nn

from adaptrank import PARAMETERIZATIONS, adapt, compile_blocks, rank_axes
from adaptrank.training.penalties import add_penalty_gradients
from gpu_parts.clock import Deadline
from gpu_parts.measures import MIB, Device, one_line
from gpu_parts.models import Graphs, Workload, frozen, sharing
from gpu_parts.settings import Settings, Size

WARMUP, EVERY, FINAL = 6, 2, 7
"""Steps before ranks may move, from one event to the next, and after the last one."""
STEADY = 4
"""Steps of which the median is taken, before the first event and at the end."""
MODES = ("eager", "compiled")


class Run:
    """Training of the SVD form under AdaLoRA, by plain calls.

    Args:
        base: the frozen model.
        workload: input and loss.
        device: where to measure.
        settings: ranks and events.
        options: options of torch.compile, or None for eager mode.
    """

    def __init__(
        self,
        base: nn.Module,
        workload: Workload,
        device: Device,
        settings: Settings,
        options: dict[str, Any] | None,
    ) -> None:
        from adaptrank.allocation import AdaLoRA

        torch.manual_seed(0)
        self.device, self.workload = device, workload
        self.outside = device.allocated()
        svd = partial(PARAMETERIZATIONS["SVD"], rank=settings.ranks[0])
        self.model = adapt(sharing(base), common.LINEAR, svd).train()
        self.graphs = Graphs()
        if options is not None:
            compile_blocks(self.model, **options)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        self.allocator = AdaLoRA(
            settings.ranks[1] * len(rank_axes(self.model)),
            soft=False,
            every=EVERY,
            warmup=WARMUP,
            final=FINAL,
        )
        self.steps = WARMUP + EVERY * settings.events + FINAL
        self.allocator.start(self.model, self.optimizer, self.steps)

    def step(self) -> None:
        """Make a training step, after which there may be an event."""
        self.workload.loss(self.model).backward()
        add_penalty_gradients(self.model)
        self.allocator.before_step()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        self.optimizer.step()
        self.had_event = self.allocator.step() is not None
        self.optimizer.zero_grad()

    def adapter_bytes(self) -> int:
        """Return the bytes of the trained tensors and of the optimizer's state."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        states = [self.optimizer.state.get(p, {}) for p in trained]
        tensors = [v for state in states for v in state.values() if torch.is_tensor(v)]
        return sum(tensor.nbytes for tensor in [*trained, *tensors])

    def row(self) -> dict[str, Any]:
        """Make a step, and return its time, the ranks after it, and the graphs made so far."""
        milliseconds = 1000 * self.device.seconds(self.step)
        ranks = [len(axis) for axis in rank_axes(self.model).values()]
        return {
            "ms": milliseconds,
            "ranks": ranks,
            "graphs": self.graphs.made(),
            "event": self.had_event,
        }

    def sizes(self) -> dict[str, Any]:
        """Return the memory of the adapter, and that of a step above the model."""
        self.workload.x.grad = None
        kept = self.device.allocated() - self.outside
        return {
            "adapter_mib": round(self.adapter_bytes() / MIB, 3),
            "peak_mib": self.device.measured((kept + self.device.peak(self.step)) / MIB),
        }


def trained(run: Run, deadline: Deadline) -> dict[str, Any]:
    """Train to the end, and return what was before the first event and after the last one.

    Raises:
        TimeoutError: when the time is over.
    """

    def row() -> dict[str, Any]:
        if not deadline.allows(0.0):
            raise TimeoutError("the time was over before the end")
        return run.row()

    rows = [row() for _ in range(WARMUP)]
    before = state(rows) | run.sizes()
    rows = [row() for _ in range(run.steps - WARMUP - 2)]
    after = state(rows) | run.sizes()
    return {"before": before, "after": after, "events": events(rows)}


def state(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the steady time, the ranks and the graphs at the end of some steps."""
    ranks = rows[-1]["ranks"]
    return {
        "ms": round(statistics.median(row["ms"] for row in rows[-STEADY:]), 3),
        "ranks": sum(ranks),
        "different": len(set(ranks)),
        "graphs": rows[-1]["graphs"],
    }


def events(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps with an event: time, ranks, and the graphs that the next step made.

    The step after an event is the first one that meets the new ranks.
    """
    return [
        {
            "ms": round(row["ms"], 3),
            "next_ms": round(after["ms"], 3),
            "ranks": sum(row["ranks"]),
            "graphs": after["graphs"] - row["graphs"],
        }
        for row, after in pairwise(rows)
        if row["event"]
    ]


def measure(size: Size, device: Device, deadline: Deadline, settings: Settings) -> dict[str, Any]:
    """Return the figures of both modes."""
    base = frozen(size, device.device)
    workload = Workload(size, device.device)
    modes: dict[str, Any] = {}
    for mode in MODES:
        options = None if mode == "eager" else settings.options
        try:
            modes[mode] = trained(Run(base, workload, device, settings, options), deadline)
        except Exception as error:
            modes[mode] = {"failed": one_line(error)}
        device.release()
    Graphs()
    return {"size": str(size), "ranks": list(settings.ranks), "modes": modes}
