"""One point of a study: a `fit` in a process of its own, whose result is kept in a folder."""

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from adaptrank._files import write_json, write_text
from adaptrank.studies.design import Point
from adaptrank.studies.engines import Result
from adaptrank.studies.inputs import read_inputs
from adaptrank.studies.verb_process import run_verb

LONGEST_ERROR = 300

MEASURES = ("shape", "rank", "effective_rank", "stable_rank", "relative")
"""Measures of a layer's change that a study collects, as `inspect` names them."""


def run_point(point: Point, out: Path) -> Result:
    """Run one `fit`, and write its result when all of it is there. A failure is a result as well.

    Fields are those of HF PEFT's method comparison where it has one: `num_trainable_params`,
    `num_total_params`, `train_time` (seconds), `file_size` (bytes), `status`, `metrics` and
    `accelerator_memory_max` (bytes, resident memory without an accelerator). `inputs` has digests
    of the files that the configuration names.

    Args:
        point: point to run.
        out: folder of the study.
    """
    folder = point_folder(out, point)
    # An earlier run that did not finish may have left files.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = yaml.safe_dump(point.config, sort_keys=False)
    write_text(folder / "config.yaml", config)

    start = time.monotonic()
    inputs = read_inputs(point.config, out)
    exit_code = run_verb(folder, _fit_command(folder))
    result = base_result(point) | {"total_time": time.monotonic() - start, "inputs": inputs}
    summaries = sorted((folder / "runs").glob("*/*/summary.json"))
    if exit_code or not summaries:
        result |= failure(folder, exit_code)
    else:
        result |= _facts(summaries[-1].parent)
        if point.spectra:
            result["spectra"] = _spectra(folder, Path(result["run"]) / "adapter")
    write_json(result_file(out, point), result)
    return result


def base_result(point: Point) -> Result:
    """Return the fields of a result that say which point it is of."""
    return {
        "key": point.key,
        "method": point.method,
        "allocator": point.allocator,
        "budget": point.budget,
        "units": point.units,
        "lr": point.lr,
        "seed": point.seed,
        "trial": point.trial,
        "grid": dict(point.grid),
        "adapter_params_at_start": point.parameters,
        "metrics": {},
        "error": "",
    }


def failure(folder: Path, exit_code: int) -> Result:
    """Return the fields of a result that say why a run failed."""
    error = _error_sentence(folder / "log.txt") or f"exit code {exit_code}"
    return {"status": "failed", "error": error}


def point_folder(out: Path, point: Point) -> Path:
    """Return the folder of a point in the folder of a study."""
    return out / "points" / point.key


def result_file(out: Path, point: Point) -> Path:
    """Return the file of the result of a point."""
    return point_folder(out, point) / "result.json"


def _fit_command(folder: Path) -> list[str]:
    return ["fit", "--config", str(folder / "config.yaml"), "--runs", str(folder / "runs")]


def _error_sentence(log: Path) -> str:
    """Return the last error of ours in a log, or the last line if there is none."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("adaptrank: ")]
    last = (errors or lines or [""])[-1]
    return re.sub(r"\s+", " ", last)[:LONGEST_ERROR]


def _facts(run: Path) -> Result:
    """Return the fields of a result that the folder of a finished run tells."""
    summary = _read_json(run / "summary.json")
    weights = (run / "adapter").glob("*.safetensors")
    ranks = run / "ranks.json"
    events = _events(run)
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
        "num_trainable_params_peak": summary["trainable"] + _closed_parameters(events),
        "num_total_params": summary["parameters"],
        "units_final": summary["ranks"],
        "units_peak": max(_allocated_units(events), default=summary["ranks"]),
        "train_time": summary["seconds"],
        "steps": summary["steps"],
        "accelerator_memory_max": summary["peak_memory_bytes"],
        "file_size": sum(file.stat().st_size for file in weights),
        "ranks": _read_json(ranks) if ranks.is_file() else {},
        "dtype": summary.get("dtype"),
    }


def _spectra(folder: Path, adapter: Path) -> dict[str, Any]:
    """Return layer -> measures of its change, empty for an adapter without matrices."""
    out = folder / "inspected"
    if run_verb(folder, ["inspect", str(adapter), "--no-intruders", "--out", str(out)]):
        return {}
    layers = _read_json(out / "inspect.json")["layers"]
    return {path: {name: each[name] for name in MEASURES} for path, each in layers.items()}


def _events(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run, empty for a run without an allocator."""
    file = run / "ranks.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _allocated_units(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the number of allocated units at each event."""
    return [event.get("allocated", 0) for event in events]


def _closed_parameters(events: Sequence[Mapping[str, Any]]) -> int:
    """Return how many more parameters a run had at its peak than at the end.

    Runs of earlier versions do not say it, and count as if they had none.
    """
    allocated = [event["allocated_parameters"] for event in events if "parameters" in event]
    return max(allocated) - int(events[-1]["parameters"]) if allocated else 0


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
