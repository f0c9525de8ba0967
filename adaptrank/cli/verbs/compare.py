"""`compare`: run a study of many runs, and report on it."""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from adaptrank._errors import did_you_mean
from adaptrank.cli.errors import ConfigError, missing_file

DESCRIPTION = """\
Run every point of a study file through `fit`, and report on all of them: methods and allocators at
matched budgets, learning rates selected by equal trials, seeds, sums of adapters. Without a study
file, --config and --grid make a plain grid. A study that was stopped goes on where it was. A
finished point is never run again, and a failed one is tried once more."""

LOSSES = ("loss", "perplexity")
"""Metrics of which less is better."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    study = "a study file, such as configs/studies/budgets.yaml"
    add("study", metavar="STUDY", nargs="?", help=study)
    config = "a configuration of `fit` instead of a study file"
    add("--config", metavar="FILE", help=config)
    grid = "values of a key, such as model.adapters.0.rank=4,8 (repeatable)"
    add("--grid", action="append", default=[], metavar="KEY=A,B", help=grid)
    metric = "reported metric of a grid (loss)"
    add("--metric", metavar="NAME", help=metric)
    mode = "whether more or less of the metric is better"
    add("--mode", choices=("max", "min"), help=mode)
    add("--data.root", dest="data", metavar="FOLDER", help="what stands for $data in the study")
    out = "for points and the report (runs/studies/NAME)"
    add("--out", metavar="FOLDER", help=out)
    add("--seeds", nargs="+", metavar="N", help="instead of the study's, such as 0 1 2 or 0,1,2")
    add("--methods", nargs="+", metavar="NAME", help="only these of the study's methods")
    baseline = "method to compare the others with, instead of the study's"
    add("--baseline", metavar="NAME", help=baseline)
    jobs = "points at a time on this machine (1)"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    ray = "on a Ray cluster; without an address on one of this machine"
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help=ray)
    plan = "only say which points there are, and which ranks meet the budgets"
    add("--plan", action="store_true", help=plan)
    add("--report", action="store_true", help="only report on what is there")


def run(options: argparse.Namespace) -> None:
    """Run the study, or a part of this work, and print the table. Exit with 1 if a run failed."""
    from adaptrank.reports.comparison import rows
    from adaptrank.reports.study import markdown, write_study

    study = _study(options)
    out = Path(options.out) if options.out else Path("runs/studies") / study.name
    count = counting(out / "counts.json")
    if options.plan:
        _print_plan(study, count)
        return
    record = _results(out, options.baseline) if options.report else _run(study, out, count, options)
    written = write_study(record, out / "report")
    print("\n" + markdown(record, rows(record)))
    print(f"Report: {out / 'report' / 'index.html'} and {len(written) - 1} files beside it")
    if any(result["status"] == "failed" for result in record["results"]):
        raise SystemExit(1)


def _study(options: argparse.Namespace) -> Any:
    """Return the study of the file or of a grid, with the methods and seeds of the options."""
    from adaptrank.studies import check_replays

    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: give 1 or more.")
    changes: dict[str, Any] = {}
    if options.seeds is not None:
        changes["seeds"] = _seeds(options.seeds)
    if options.grid:
        changes["grid"] = dict(map(_grid_values, options.grid))
    for name in ("metric", "mode", "baseline"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    study = _study_of(options, changes)
    if not options.methods:
        return study
    for name in options.methods:
        if name not in study.methods:
            raise ConfigError(
                f"--methods {quote(name)} is none of the study's."
                f"{did_you_mean(name, study.methods)} "
                f"It has {', '.join(map(quote, study.methods))}."
            )
    methods = {name: study.methods[name] for name in options.methods}
    check_replays(study.config, methods, study.allocators, _require_methods)
    return replace(study, methods=methods)


def _require_methods(condition: bool, mistake: str) -> None:
    """Refuse a choice of methods in which one refers to another that is left out."""
    if not condition:
        raise ConfigError(f"--methods: {mistake}.")


def _study_of(options: argparse.Namespace, changes: Mapping[str, Any]) -> Any:
    """Return the study of a file, or of a configuration with a grid."""
    from adaptrank.studies import make_study, read_study

    if (options.study is None) == (options.config is None):
        raise ConfigError(
            "compare needs a study file, or a configuration to vary: "
            "`python -m adaptrank compare --config FILE --grid KEY=A,B`."
        )
    if options.study is not None:
        if not Path(options.study).is_file():
            raise ConfigError(missing_file(options.study, "study file"))
        return read_study(Path(options.study), options.data, changes)
    file = Path(options.config)
    if not file.is_file():
        raise ConfigError(missing_file(options.config, "configuration file"))
    stated = {"config": file.name, "methods": {file.stem: {}}, "metric": "loss", **changes}
    stated.setdefault("mode", "min" if stated["metric"] in LOSSES else "max")
    return make_study(stated, file, options.data)


def _seeds(given: Sequence[str]) -> list[int]:
    """Return seeds that are separated by spaces or commas."""
    texts = [text for part in given for text in part.split(",") if text]
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise ConfigError(f"--seeds {' '.join(given)}: give whole numbers, such as 0,1.") from None


def _grid_values(given: str) -> tuple[str, list[Any]]:
    """Return (key, values) of an option such as `model.lr=1e-4,3e-4`."""
    import yaml

    key, equals, text = given.partition("=")
    try:
        values = yaml.safe_load(f"[{text}]") if equals and text else []
    except yaml.YAMLError:
        values = []
    if not key or not values:
        raise ConfigError(
            f"--grid {given!r} names no values. Write KEY=A,B, such as model.adapters.0.rank=4,8."
        )
    return key, list(map(_as_number, values))


def _as_number(value: Any) -> Any:
    """Return 1e-4, which YAML reads as a text, as a number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _results(out: Path, baseline: str | None) -> Any:
    """Return the results that a study left, with another baseline if one is given."""
    from adaptrank.reports.records import read_study_results

    file = out / "results.json"
    if not file.is_file():
        raise ConfigError(f"There are no results in {out}. Run the study first.")
    record = read_study_results(file)
    return record if baseline is None else {**record, "baseline": baseline}


def _run(study: Any, out: Path, count: Callable[..., int], options: argparse.Namespace) -> Any:
    """Run all points that are not finished, and return the results."""
    from adaptrank.cli.signatures import accepts
    from adaptrank.studies import on_ray, on_this_machine, run_study

    if options.ray is None:
        engine = on_this_machine(options.jobs)
    else:
        engine = on_ray(None if options.ray == "local" else options.ray)
    return run_study(study, out, count, engine, lambda line: print(line, flush=True), accepts)


def _print_plan(study: Any, count: Callable[..., int]) -> None:
    """Print the settings of a study, with their sizes and numbers of runs."""
    from adaptrank.cli.signatures import accepts
    from adaptrank.reports.comparison import row_label
    from adaptrank.studies import Setting, reported_points, solve_settings, trial_points

    total = 0
    for setting in solve_settings(study, count, accepts):
        if not isinstance(setting, Setting):
            print(f"  left out: {setting}")
            continue
        trials = study.search.get("trials") or len(trial_points(study, setting))
        runs = trials + len(reported_points(study, setting, None))
        total += runs
        budget = "" if setting.budget is None else f" of {setting.budget:,}"
        units = "" if setting.units is None else f", $budget = {setting.units}"
        facts = {"method": setting.method, "allocator": setting.allocator}
        name = row_label(facts | {"grid": dict(setting.grid)})
        # A round may train fewer of them. `plan` lists the rounds of one configuration.
        whose = " before the training strategy" if setting.config.get("training_strategy") else ""
        print(f"  {name}: {setting.parameters:,}{budget} parameters{whose}{units}; {runs} runs")
    for name, entry in study.sums.items():
        print(f"  {name}: composed of {', '.join(entry['of'])}, for each seed")
    print(f"{total} runs in all")


def counting(file: Path) -> Callable[[Mapping[str, Any]], int]:
    """Return a function that counts the parameters which train in a configuration's adapters.

    Args:
        file: JSON file that keeps the counts, by a digest of the configuration.
    """
    from adaptrank._files import write_json
    from adaptrank.reports.records import COUNTS, check_fields, read_table
    from adaptrank.studies import SEED, map_texts, without_replays

    known = read_table(file)
    check_fields(str(file), {"counts": known}, {"counts": COUNTS})

    def count(config: Mapping[str, Any]) -> int:
        kept = ("model", "data", "seed_everything")
        plain = {key: value for key, value in config.items() if key in kept}
        # A rank pattern that a run has still to find leaves the count as it is.
        plain = without_replays(plain)
        # No seed changes the count.
        plain = map_texts(plain, lambda text: 0 if text == SEED else text)
        text = json.dumps(plain, sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        if key not in known:
            known[key] = _count(plain)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
        return int(known[key])

    return count


def _count(config: Mapping[str, Any]) -> int:
    """Return the parameters of a configuration's adapters, as `plan` counts them."""
    import yaml

    from adaptrank.cli.preparation import count_adapters

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return count_adapters(["--config", str(file)])
