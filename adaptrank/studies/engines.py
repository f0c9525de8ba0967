"""Engines that run the points of a study: on this machine, or on a Ray cluster."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from adaptrank.studies.design import Point

Result = dict[str, Any]
"""Outcome of one point, as its file has it."""

RunPoint = Callable[[Point, Path], Result]
"""(point, folder of the study) -> result."""


class Engine(Protocol):
    """Runs a function on points, at once or one after the other, and yields the results."""

    def __call__(
        self, function: RunPoint, points: Sequence[Point], out: Path
    ) -> Iterable[Result]: ...


def on_this_machine(jobs: int = 1) -> Engine:
    """Return an engine for processes of this machine.

    Args:
        jobs: number of points at a time. They share the cores of the machine.
    """

    def engine(function: RunPoint, points: Sequence[Point], out: Path) -> Iterable[Result]:
        if jobs > 1:
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(lambda point: function(point, out), points)

    return engine


def on_ray(address: str | None = None, cpus: float = 1, gpus: float = 0) -> Engine:
    """Return an engine for the tasks of a Ray cluster, whose machines all see the folder `out`.

    Args:
        address: address of the cluster. None starts one on this machine.
        cpus: number of CPUs for a point.
        gpus: number of GPUs for a point.

    Raises:
        ModuleNotFoundError: if Ray is missing.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Studies on a cluster need Ray: pip install 'adaptrank[ray]'."
        ) from error

    def engine(function: RunPoint, points: Sequence[Point], out: Path) -> Iterable[Result]:
        # By default Ray's workers make way for everything else on the machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(function)
        waiting = [task.remote(point, out.resolve()) for point in points]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)

    return engine
