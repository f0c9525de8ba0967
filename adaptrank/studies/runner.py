"""Run the points of a study that are not finished, and put all results together."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank._files import write_json
from adaptrank.studies.design import (
    Count,
    Point,
    Setting,
    reported_points,
    solve_settings,
    trial_points,
)
from adaptrank.studies.engines import Engine, Result, RunPoint
from adaptrank.studies.inputs import digest_of
from adaptrank.studies.key_paths import Accepts
from adaptrank.studies.point_run import point_folder, result_file, run_point
from adaptrank.studies.references import replay_references
from adaptrank.studies.replays import with_replay
from adaptrank.studies.search import RunPoints, mean_metric, search_trials
from adaptrank.studies.study_file import Study
from adaptrank.studies.sum_run import SumPoint, run_sum, sum_points

Say = Callable[[str], None]
"""Prints one line of progress."""


def run_study(
    study: Study,
    out: Path,
    count: Count,
    engine: Engine,
    say: Say = print,
    accepts: Accepts | None = None,
) -> dict[str, Any]:
    """Solve budgets, select learning rates, run all points, and return the results.

    Learning rates are selected for every setting by equal trials, on the data of `selection`,
    before any reported run. Points whose results are in `out` are not run again.

    Args:
        study: study to run.
        out: folder of the study.
        count: counts the parameters of a configuration.
        engine: runs points.
        say: prints one line of progress.
        accepts: tells which class takes an argument, for short keys of a grid.

    Returns:
        Plain data, also written to `results.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    solved = list(solve_settings(study, count, accepts))
    left_out = [reason for reason in solved if isinstance(reason, str)]
    settings = [setting for setting in solved if isinstance(setting, Setting)]
    for reason in left_out:
        say(f"left out: {reason}")

    def run_points(points: Sequence[Point], noun: str) -> list[Result]:
        return _run_points(points, out, engine, say, noun)

    trial_results = _run_all_trials(study, settings, run_points)
    points: list[Point] = []
    for setting in settings:
        points += reported_points(study, setting, _selected_lr(study, setting, trial_results))
    direct = [point for point in points if not replay_references(point.config)]
    results = run_points(direct, "runs")
    replays = [with_replay(point, results) for point in points if replay_references(point.config)]
    results += run_points(replays, "replays")
    results += _run_sums(study, results, left_out, out, engine, say)

    record = _record(study, left_out, trial_results, results)
    write_json(out / "results.json", record)
    return record


def _run_all_trials(
    study: Study, settings: Sequence[Setting], run_points: RunPoints
) -> list[Result]:
    """Run the trials of all settings.

    A setting that replays another one replays its best trial, and not a reported run.
    """
    direct = [setting for setting in settings if not replay_references(setting.config)]
    replaying = [setting for setting in settings if setting not in direct]
    results = _run_trials(study, direct, run_points)
    best = {_row_of(setting): _selected_lr(study, setting, results) for setting in direct}
    sources = [result for result in results if result["lr"] == best[_row_of_result(result)]]

    def run_replays(points: Sequence[Point], noun: str) -> list[Result]:
        return run_points([with_replay(point, sources) for point in points], f"{noun} of replays")

    if replaying:
        results += _run_trials(study, replaying, run_replays)
    return results


def _run_trials(study: Study, settings: Sequence[Setting], run_points: RunPoints) -> list[Result]:
    """Run the trials that select learning rates, from a list or by a search."""
    if study.search:
        return search_trials(study, settings, run_points)
    trials: list[Point] = []
    for setting in settings:
        trials += trial_points(study, setting)
    return run_points(trials, "trials")


def _run_sums(
    study: Study,
    results: Sequence[Result],
    left_out: list[str],
    out: Path,
    engine: Engine,
    say: Say,
) -> list[Result]:
    """Compose and evaluate the sums of a study. Those without all their parts are left out."""
    points: list[SumPoint] = []
    for point in sum_points(study, results):
        if isinstance(point, str):
            say(f"left out: {point}")
            left_out.append(point)
        else:
            points.append(point)
    return _run_points(points, out, engine, say, "sums", run_sum)


def _run_points(
    points: Sequence[Point],
    out: Path,
    engine: Engine,
    say: Say,
    noun: str,
    run: RunPoint = run_point,
) -> list[Result]:
    """Run the points that are not finished, and return the results of all of them.

    Raises:
        UserError: if data of finished points have changed.
    """
    waiting = [point for point in points if not _is_finished(out, point)]
    _check_inputs([point for point in points if point not in waiting], out)
    if points:
        say(f"{len(points)} {noun}, {len(points) - len(waiting)} of them finished before")
    start = time.monotonic()
    for done, result in enumerate(engine(run, waiting, out), 1):
        seconds_left = (time.monotonic() - start) / done * (len(waiting) - done)
        say(
            f"[{done}/{len(waiting)}] {result['key']}: {_outcome(result)}  "
            f"({seconds_left / 60:.0f} min left)"
        )
    return [_read_result(out, point) for point in points]


def _outcome(result: Result) -> str:
    """Return the metrics of a run, or its error, as a text."""
    if result["status"] == "failed":
        return str(result["error"])
    return ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())


def _is_finished(out: Path, point: Point) -> bool:
    if not result_file(out, point).is_file():
        return False
    return bool(_read_result(out, point)["status"] == "success")


def _check_inputs(finished: Sequence[Point], out: Path) -> None:
    """Refuse to report results of files that hold something else now."""
    digests: dict[str, str] = {}
    stale: dict[str, list[Path]] = {}
    for point in finished:
        for path, before in (_read_result(out, point).get("inputs") or {}).items():
            if path not in digests:
                digests[path] = digest_of(path, out)
            if digests[path] != before:
                stale.setdefault(path, []).append(point_folder(out, point))
    for path, folders in stale.items():
        raise UserError(
            f"{path} has changed since finished runs read it ({len(folders)}, such as "
            f"{folders[0]}). Give another --out, or delete {out} to run them again."
        )


def _read_result(out: Path, point: Point) -> Result:
    """Return the result of a point.

    Raises:
        UserError: if its file is damaged.
    """
    file = result_file(out, point)
    try:
        result: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict) or not {"key", "status"} <= result.keys():
        raise UserError(f"{file} holds no result of a run. Delete it, and the point runs again.")
    return result


def _selected_lr(study: Study, setting: Setting, trial_results: Sequence[Result]) -> float | None:
    """Return the best learning rate of a setting, or the middle one if trials of all rates failed.

    A rate counts by its mean over the seeds of the trials. Of two equally good rates the lower one
    is taken. None is the configuration's own rate.
    """
    if len(study.lrs) < 2 and not study.search:
        return study.lrs[0] if study.lrs else None
    trials_of_rates: dict[float, list[Result]] = {}
    for result in trial_results:
        if _row_of_result(result) == _row_of(setting):
            trials_of_rates.setdefault(result["lr"], []).append(result)
    tried: list[tuple[float, float]] = []
    for lr, trials in trials_of_rates.items():
        value = mean_metric(study, trials)
        if value is not None:
            tried.append((study.selection_sign * value, lr))
    if not tried and study.search:
        # Without a result, the middle of the range on the logarithmic scale.
        return float(f"{math.sqrt(study.search['low'] * study.search['high']):.4g}")
    if not tried:
        return sorted(study.lrs)[len(study.lrs) // 2]
    return float(min(tried)[1])


RowKey = tuple[str, str, int | None, str]
"""Method, allocator, budget, and the point of the grid as a text."""


def _row_of(setting: Setting) -> RowKey:
    return setting.method, setting.allocator, setting.budget, repr(dict(setting.grid))


def _row_of_result(result: Result) -> RowKey:
    grid = result.get("grid") or {}
    return result["method"], result["allocator"], result["budget"], repr(grid)


def _record(
    study: Study,
    left_out: Sequence[str],
    trial_results: Sequence[Result],
    results: Sequence[Result],
) -> dict[str, Any]:
    """Return all that a report of the study needs."""
    selects = len(study.lrs) > 1 or bool(study.search)
    return {
        "study": study.name,
        "title": study.title,
        "limits": study.limits,
        "metric": study.metric,
        "mode": study.mode,
        "baseline": study.baseline,
        "selected_on": (study.selection.get("name") or "a slice of train") if selects else None,
        "selected_by": study.selection.get("metric") if selects else None,
        "selection_seeds": list(study.trial_seeds),
        "reported_on": study.reported_on,
        "lrs": list(study.lrs),
        "search": dict(study.search) or None,
        "grid": {key: list(values) for key, values in study.grid.items()},
        "seeds": list(study.seeds),
        "spectra": study.spectra,
        "left_out": list(left_out),
        "trials": list(trial_results),
        "results": list(results),
    }
