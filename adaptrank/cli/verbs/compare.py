"""`compare`: run a study of many runs, and report on it."""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrank._errors import did_you_mean
from adaptrank.cli.errors import ConfigError, missing_file

DESCRIPTION = """\
Run every point of a study file through `fit`, and report on all of them: methods and allocators at
matched budgets, learning rates selected by equal trials, seeds. A study that was stopped goes on
where it was. A finished point is never run again, and a failed one is tried once more."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    study = "a study file, such as configs/studies/budgets.yaml"
    add("study", metavar="STUDY", help=study)
    add("--data.root", dest="data", metavar="FOLDER", help="what stands for $data in the study")
    out = "for points and the report (runs/studies/NAME)"
    add("--out", metavar="FOLDER", help=out)
    add("--seeds", type=int, nargs="+", metavar="N", help="instead of the study's")
    add("--methods", nargs="+", metavar="NAME", help="only these of the study's methods")
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
    record = _results(out) if options.report else _run(study, out, count, options)
    written = write_study(record, out / "report")
    print("\n" + markdown(record, rows(record)))
    print(f"Report: {out / 'report' / 'index.html'} and {len(written) - 1} files beside it")
    if any(result["status"] == "failed" for result in record["results"]):
        raise SystemExit(1)


def _study(options: argparse.Namespace) -> Any:
    """Return the study of the file, with the methods and seeds of the options."""
    from adaptrank.studies import read_study

    if not Path(options.study).is_file():
        raise ConfigError(missing_file(options.study, "study file"))
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: give 1 or more.")
    changes = {} if options.seeds is None else {"seeds": options.seeds}
    study = read_study(Path(options.study), options.data, changes)
    if not options.methods:
        return study
    for name in options.methods:
        if name not in study.methods:
            raise ConfigError(
                f"--methods {name} is none of the study's.{did_you_mean(name, study.methods)} "
                f"It has {', '.join(study.methods)}."
            )
    return replace(study, methods={name: study.methods[name] for name in options.methods})


def _results(out: Path) -> Any:
    """Return the results that a study left."""
    from adaptrank.reports.records import read_study_results

    file = out / "results.json"
    if not file.is_file():
        raise ConfigError(f"There are no results in {out}. Run the study first.")
    return read_study_results(file)


def _run(study: Any, out: Path, count: Callable[..., int], options: argparse.Namespace) -> Any:
    """Run all points that are not finished, and return the results."""
    from adaptrank.studies import on_ray, on_this_machine, run_study

    if options.ray is None:
        engine = on_this_machine(options.jobs)
    else:
        engine = on_ray(None if options.ray == "local" else options.ray)
    return run_study(study, out, count, engine, lambda line: print(line, flush=True))


def _print_plan(study: Any, count: Callable[..., int]) -> None:
    """Print the settings of a study, with their sizes and numbers of runs."""
    from adaptrank.studies import Setting, reported_points, solve_settings, trial_points

    total = 0
    for setting in solve_settings(study, count):
        if not isinstance(setting, Setting):
            print(f"  left out: {setting}")
            continue
        runs = len(trial_points(study, setting)) + len(reported_points(study, setting, None))
        total += runs
        budget = "" if setting.budget is None else f" of {setting.budget:,}"
        units = "" if setting.units is None else f", $budget = {setting.units}"
        name = setting.method
        if setting.allocator != "none":
            name = f"{setting.method}, {setting.allocator}"
        print(f"  {name}: {setting.parameters:,}{budget} parameters{units}; {runs} runs")
    print(f"{total} runs in all")


def counting(file: Path) -> Callable[[Mapping[str, Any]], int]:
    """Return a function that counts the parameters which train in a configuration's adapters.

    Args:
        file: JSON file that keeps the counts, by a digest of the configuration.
    """
    from adaptrank._files import write_json
    from adaptrank.reports.records import COUNTS, check_fields, read_table
    from adaptrank.studies import without_replays

    known = read_table(file)
    check_fields(str(file), {"counts": known}, {"counts": COUNTS})

    def count(config: Mapping[str, Any]) -> int:
        kept = ("model", "data", "seed_everything")
        plain = {key: value for key, value in config.items() if key in kept}
        # A rank pattern that a run has still to find leaves the count as it is.
        plain = without_replays(plain)
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

    from adaptrank.cli.verbs.plan import describe

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        described = describe(["--config", str(file)])
    return sum(described["layers"].values())
