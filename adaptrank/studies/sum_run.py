"""Sums of a study: adapters of its runs that are composed, and evaluated as one."""

import csv
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from adaptrank._errors import UserError
from adaptrank._files import write_json, write_text
from adaptrank.studies.design import Point
from adaptrank.studies.engines import Result
from adaptrank.studies.inputs import read_inputs
from adaptrank.studies.overlays import Config, merge
from adaptrank.studies.point_run import base_result, failure, point_folder, result_file
from adaptrank.studies.study_file import Study
from adaptrank.studies.verb_process import run_verb

METRICS = "metrics.csv"
"""File of Lightning's CSVLogger."""


@dataclass(frozen=True)
class SumPoint(Point):
    """One composition of adapters, and its evaluation.

    Args:
        parts: results of the runs whose adapters are composed.
        options: options of `compose`.
        like: method whose data the evaluation reads, None for the data of the study.
    """

    parts: Sequence[Result] = field(default=(), hash=False, compare=False)
    options: tuple[str, ...] = ()
    like: str | None = None


def sum_points(study: Study, results: Sequence[Result]) -> Iterator[SumPoint | str]:
    """Yield one point for each sum, seed, allocator, budget and grid point that has all its parts.

    A sum that lacks a part is yielded as a sentence.

    Args:
        study: the study.
        results: results of its runs.
    """
    for name, entry in study.sums.items():
        methods = entry["of"]
        for first in _results_of(results, methods[0]):
            parts = [_partner(results, first, method) for method in methods]
            present = [part for part in parts if part is not None]
            if len(present) < len(methods):
                missing = [m for m, part in zip(methods, parts, strict=True) if part is None]
                yield f"{name}, seed {first['seed']}: there is no run of {', '.join(missing)}"
            else:
                yield _sum_point(study, name, entry, present)


def _results_of(results: Sequence[Result], method: str) -> list[Result]:
    found = [result for result in results if result["method"] == method]
    return [result for result in found if result["status"] == "success"]


def _partner(results: Sequence[Result], first: Result, method: str) -> Result | None:
    """Return the result of a method that belongs to another method's result."""
    same = ("allocator", "budget", "seed")
    for result in _results_of(results, method):
        grids_agree = (result.get("grid") or {}) == (first.get("grid") or {})
        if grids_agree and all(result[key] == first[key] for key in same):
            return result
    return None


def _sum_point(
    study: Study, name: str, entry: Mapping[str, Any], parts: Sequence[Result]
) -> SumPoint:
    first, like = parts[0], entry.get("like")
    overlay = {} if like is None else study.methods[like]
    config = _evaluated(merge(study.config, overlay), first["seed"])
    options = ["--method", str(entry.get("method", "sum"))]
    if entry.get("weights"):
        options += ["--weights", *map(str, entry["weights"])]
    for option, value in (entry.get("options") or {}).items():
        options += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    point = SumPoint(
        method=name,
        allocator=first["allocator"],
        budget=first["budget"],
        lr=None,
        seed=first["seed"],
        units=None,
        parameters=sum(part["adapter_params_at_start"] for part in parts),
        trial=False,
        config=config,
        grid=tuple((first.get("grid") or {}).items()),
        parts=parts,
        options=tuple(options),
        like=like,
    )
    # What is composed is a part of the configuration, so that the folder of the point is new
    # where a part is.
    composed = {"of": [part["key"] for part in parts], "options": options}
    return replace(point, config={**config, "composed": composed})


def _evaluated(config: Config, seed: int) -> Config:
    """Return a configuration of `fit` as one of `validate`, without an adapter to make."""
    keys = ("model", "data", "trainer")
    result = {key: value for key, value in config.items() if key in keys}
    result["seed_everything"] = seed
    overlay = {"model": {"init_args": {"adapters": None, "rank_pattern": None}}}
    return merge(result, overlay)


def run_sum(point: Point, out: Path) -> Result:
    """Compose the adapters of a point, evaluate the result, and write what came out.

    The time is that of the parts together, and the memory that of the largest one.

    Args:
        point: point to run.
        out: folder of the study.
    """
    assert isinstance(point, SumPoint)
    folder = point_folder(out, point)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    adapter = folder / "adapter"
    inputs = read_inputs(point.config, out)
    start = time.monotonic()
    adapters = [str(Path(part["run"]) / "adapter") for part in point.parts]
    exit_code = run_verb(folder, ["compose", *adapters, "--out", str(adapter), *point.options])
    if not exit_code:
        config = folder / "config.yaml"
        write_text(config, _configuration(point, folder, adapter))
        exit_code = run_verb(folder, ["validate", "--config", str(config)])
    result = base_result(point) | {
        "total_time": time.monotonic() - start,
        "inputs": inputs,
        "against": point.like,
        "of": [part["method"] for part in point.parts],
    }
    if exit_code:
        result |= failure(folder, exit_code)
    else:
        result |= _facts(point, folder)
    write_json(result_file(out, point), result)
    return result


def _configuration(point: SumPoint, folder: Path, adapter: Path) -> str:
    """Return the configuration of the evaluation, whose metrics go into a file."""
    config = {key: value for key, value in point.config.items() if key != "composed"}
    init_args = {"save_dir": str(folder), "name": "", "version": ""}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": init_args}
    overlay = {
        "model": {"init_args": {"adapter": str(adapter)}},
        "trainer": {"logger": logger},
    }
    return yaml.safe_dump(merge(config, overlay), sort_keys=False)


def _facts(point: SumPoint, folder: Path) -> Result:
    """Return the fields of a result that the composed adapter and its evaluation tell."""
    report = json.loads((folder / "adapter" / "composition.json").read_text(encoding="utf-8"))
    weights = list((folder / "adapter").glob("*.safetensors"))
    ranks = [facts["rank"] for facts in report["layers"].values() if "rank" in facts]
    parts = point.parts
    return {
        "status": "success",
        "run": str(folder),
        "metrics": _read_metrics(folder / METRICS),
        "num_trainable_params": sum(part["num_trainable_params"] for part in parts),
        "num_total_params": parts[0]["num_total_params"],
        "units_final": sum(ranks),
        "units_peak": sum(ranks),
        "train_time": sum(part["train_time"] for part in parts),
        "accelerator_memory_max": max(part["accelerator_memory_max"] for part in parts),
        "file_size": sum(file.stat().st_size for file in weights),
        "ranks": {},
        "similarity": {"rms_cos": report["rms_cos"], "pairs": report["pairs"]},
    }


def _read_metrics(file: Path) -> dict[str, float]:
    """Return the last number of each metric in a file of CSVLogger."""
    metrics: dict[str, float] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            numbers = {name: value for name, value in row.items() if value}
            metrics |= {name: float(value) for name, value in numbers.items()}
    for name in ("step", "epoch"):
        metrics.pop(name, None)
    if not metrics:
        raise UserError(f"{file} holds no metric of an evaluation.")
    return metrics
