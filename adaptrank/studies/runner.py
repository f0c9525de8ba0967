"""Points -> results: each is one `fit` in a process of its own, kept in a folder, and never run twice once it is finished."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from adaptrank.artifacts.run import write_json
from adaptrank.studies.design import Count, Place, Point, Study, places, replaced, reported, trials

Result = dict[str, Any]
Say = Callable[[str], None]


class Engine(Protocol):
    """(function, points) -> a result for each, in their order; at once or one after the other."""

    def __call__(
        self, function: Callable[[Point, Path], Result], points: Sequence[Point], out: Path
    ) -> Iterable[Result]: ...


def run_study(
    study: Study, out: Path, count: Count, engine: Engine, say: Say = print
) -> dict[str, Any]:
    """Solve, select, run, and return all results as JSON-able data; what is in `out` already is not done again.

    Learning rates are selected for every place by equal trials, on the data of `selection`, before anything is reported.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = list(places(study, count))
    left_out = [one for one in found if isinstance(one, str)]
    for why in left_out:
        say(f"left out: {why}")
    kept = [place for place in found if isinstance(place, Place)]
    asked = [point for place in kept for point in trials(study, place)]
    tried = _all(asked, out, engine, say, "trials")
    rates = {id(place): _selected(study, place, tried) for place in kept}
    points = [point for place in kept for point in reported(study, place, rates[id(place)])]
    replays = [point for point in points if replayed(point)]
    first = _all([point for point in points if not replayed(point)], out, engine, say, "runs")
    results = first + _all(
        [_with_ranks(point, first) for point in replays], out, engine, say, "replays"
    )
    record = {
        "study": study.name,
        "title": study.title,
        "limits": study.limits,
        "metric": study.metric,
        "mode": study.mode,
        "baseline": study.baseline,
        "selected_on": (study.selection.get("name") or "a slice of train")
        if len(study.lrs) > 1
        else None,
        "selected_by": study.selection.get("metric") if len(study.lrs) > 1 else None,
        "reported_on": study.reported_on,
        "lrs": list(study.lrs),
        "seeds": list(study.seeds),
        "left_out": left_out,
        "trials": tried,
        "results": results,
    }
    write_json(out / "results.json", record)
    return record


_REPLAY = re.compile(r"\$ranks:(?P<method>[^:]+)(:(?P<allocator>.+))?")


def replayed(point: Point) -> str | None:
    """What of its configuration says `$ranks:METHOD` or `$ranks:METHOD:ALLOCATOR`: it starts from the ranks that that run of the same seed
    and budget found, and comes after it."""
    found: list[str] = []
    replaced(point.config, lambda text: found.append(text) if _REPLAY.fullmatch(text) else None)
    return found[0] if found else None


def _with_ranks(point: Point, results: Sequence[Result]) -> Point:
    asked = _REPLAY.fullmatch(replayed(point) or "")
    assert asked is not None
    method, allocator = asked["method"], asked["allocator"] or "none"
    for result in results:
        alike = (result["method"], result["allocator"], result["seed"]) == (
            method,
            allocator,
            point.seed,
        )
        if alike and result["budget"] in (point.budget, None) and result["status"] == "success":
            return replace(
                point, config=_filled_in(point.config, str(Path(result["run"]) / "ranks.json"))
            )
    return point  # it fails, and says that there is no such file


def without_replays(value: Any) -> Any:
    """A configuration without the keys whose values are found by other runs."""
    if isinstance(value, dict):
        return {
            k: without_replays(v)
            for k, v in value.items()
            if not (isinstance(v, str) and _REPLAY.fullmatch(v))
        }
    return [without_replays(one) for one in value] if isinstance(value, list) else value


def _filled_in(config: dict[str, Any], ranks: str) -> dict[str, Any]:
    found: dict[str, Any] = replaced(
        config, lambda text: ranks if _REPLAY.fullmatch(text) else text
    )
    return found


def _all(points: Sequence[Point], out: Path, engine: Engine, say: Say, what: str) -> list[Result]:
    waiting = [point for point in points if not _finished(out, point)]
    if points:
        say(f"{len(points)} {what}, {len(points) - len(waiting)} of them finished before")
    start = time.monotonic()
    for done, result in enumerate(engine(run_point, waiting, out), 1):
        left = (time.monotonic() - start) / done * (len(waiting) - done)
        words = (
            result["error"]
            if result["status"] == "failed"
            else ", ".join(f"{k} {v:.4g}" for k, v in result["metrics"].items())
        )
        say(f"[{done}/{len(waiting)}] {result['key']}: {words}  ({left / 60:.0f} min left)")
    return [json.loads(_file(out, point).read_text(encoding="utf-8")) for point in points]


def _file(out: Path, point: Point) -> Path:
    return out / "points" / point.key / "result.json"


def _finished(out: Path, point: Point) -> bool:
    file = _file(out, point)
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["status"] == "success"


def _selected(study: Study, place: Place, tried: Sequence[Result]) -> float | None:
    """The best learning rate of a place; the middle one where all trials failed."""
    if len(study.lrs) < 2:
        return study.lrs[0] if study.lrs else None
    own = [
        (result["metrics"][study.selection["metric"]], result["lr"])
        for result in tried
        if (result["method"], result["allocator"], result["budget"])
        == (place.method, place.allocator, place.budget)
        and math.isfinite(result["metrics"].get(study.selection["metric"], math.nan))
    ]
    if not own:
        return sorted(study.lrs)[len(study.lrs) // 2]
    sign = -1 if study.selection.get("mode", "min") == "max" else 1
    return float(min(own, key=lambda pair: (sign * pair[0], pair[1]))[1])


def run_point(point: Point, out: Path) -> Result:
    """One `fit` in a process of its own; its result is written when all of it is there, a failure as well.

    Fields are those of HF PEFT's method comparison where there is one for it: `num_trainable_params`, `num_total_params`,
    `train_time` (seconds), `file_size` (bytes), `status`, `metrics`, `accelerator_memory_max` (bytes; resident without an accelerator).
    """
    folder = out / "points" / point.key
    shutil.rmtree(folder, ignore_errors=True)  # a run that did not finish
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(point.config, sort_keys=False), encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "adaptrank",
        "fit",
        "--config",
        str(folder / "config.yaml"),
        "--runs",
        str(folder / "runs"),
    ]
    start = time.monotonic()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    result: Result = {
        "key": point.key,
        "method": point.method,
        "allocator": point.allocator,
        "budget": point.budget,
        "units": point.units,
        "lr": point.lr,
        "seed": point.seed,
        "trial": point.trial,
        "total_time": time.monotonic() - start,
        "adapter_params_at_start": point.parameters,
        "metrics": {},
        "error": "",
    }
    runs = sorted((folder / "runs").glob("*/*/summary.json"))
    if done.returncode or not runs:
        lines = [
            line
            for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        result |= {"status": "failed", "error": _last(lines) or f"exit code {done.returncode}"}
    else:
        result |= _facts(runs[-1])
    write_json(folder / "result.json", result)
    return result


def _last(lines: Sequence[str]) -> str:
    """The sentence of a failure: the line of ours if there is one, else the last of all."""
    own = [line for line in lines if line.startswith("adaptrank: ")]
    return re.sub(r"\s+", " ", (own or list(lines) or [""])[-1])[:300]


def _facts(file: Path) -> Result:
    summary = json.loads(file.read_text(encoding="utf-8"))
    run = file.parent
    weights = list((run / "adapter").glob("*.safetensors"))
    events = run / "ranks.jsonl"
    allocated = (
        [
            json.loads(line).get("allocated", 0)
            for line in events.read_text(encoding="utf-8").splitlines()
        ]
        if events.is_file()
        else []
    )
    ranks = run / "ranks.json"
    return {
        "status": "success",
        "run": str(run),
        "metrics": {
            name: value
            for name, value in summary["after"].items()
            if isinstance(value, int | float)
        },
        "before": summary["before"],
        "num_trainable_params": summary["trainable"],
        "num_total_params": summary["parameters"],
        "units_final": summary["ranks"],
        "units_peak": max(allocated, default=summary["ranks"]),
        "train_time": summary["seconds"],
        "steps": summary["steps"],
        "accelerator_memory_max": summary["peak_memory_bytes"],
        "file_size": sum(w.stat().st_size for w in weights),
        "ranks": json.loads(ranks.read_text(encoding="utf-8")) if ranks.is_file() else {},
    }


# ---- engines


def here(jobs: int = 1) -> Engine:
    """Runs points in processes of this machine, `jobs` at a time, which share its cores."""

    def engine(
        function: Callable[[Point, Path], Result], points: Sequence[Point], out: Path
    ) -> Iterable[Result]:
        if jobs > 1:
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(lambda point: function(point, out), points)

    return engine


def on_ray(address: str | None = None, cpus: float = 1, gpus: float = 0) -> Engine:
    """Runs points as tasks of a Ray cluster, which all see the folder `out`.

    Args:
        address: of the cluster; None starts one on this machine.
        cpus, gpus: that a point takes.
    Raises:
        ModuleNotFoundError: if Ray is missing.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Studies on a cluster need Ray: pip install 'adaptrank[ray]'."
        ) from error

    def engine(
        function: Callable[[Point, Path], Result], points: Sequence[Point], out: Path
    ) -> Iterable[Result]:
        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # by default it makes way for everything else on the machine
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(function)
        waiting = [task.remote(point, out.resolve()) for point in points]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)

    return engine
