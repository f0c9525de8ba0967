"""`compare`: a study of many runs."""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.cli import errors
from adaptrank.cli.verbs import make_parser, run_verb


def compare(args: Sequence[str]) -> None:
    """Run a study and report on it."""
    parser = make_parser(
        "compare",
        "Run every point of a study file through `fit`, and report on all of them: methods and allocators at matched\n"
        "budgets, learning rates selected by equal trials, seeds. A study that was stopped goes on where it was; what is\n"
        "finished is never run again, what failed is tried once more.",
    )
    parser.add_argument(
        "study", metavar="STUDY", help="a study file, such as configs/studies/budgets.yaml"
    )
    parser.add_argument(
        "--data.root", dest="data", metavar="FOLDER", help="what stands for $data in the study"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="for points and the report (runs/studies/NAME)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of the study's")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="only these of the study's methods"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="points at a time on this machine (1)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on a Ray cluster; without an address on one of this machine",
    )
    parser.add_argument(
        "--plan", action="store_true", help="only say which points there are, and what was solved"
    )
    parser.add_argument("--report", action="store_true", help="only report on what is there")
    run_verb(_compare, parser.options(args))


def _compare(options: argparse.Namespace) -> None:
    from adaptrank.reports.comparison import rows
    from adaptrank.reports.study import markdown, write_study
    from adaptrank.studies import on_ray, on_this_machine, read_study, run_study

    if not Path(options.study).is_file():
        raise errors.ConfigError(errors.missing_file(options.study, "study file"))
    if options.jobs < 1:
        raise errors.ConfigError(f"--jobs {options.jobs}: 1 or more.")
    try:
        study = read_study(
            Path(options.study),
            options.data,
            {} if options.seeds is None else {"seeds": options.seeds},
        )
    except (FileNotFoundError, ValueError) as error:
        raise errors.ConfigError(str(error)) from error
    if options.methods:
        from dataclasses import replace

        for name in options.methods:
            if name not in study.methods:
                raise errors.ConfigError(
                    f"--methods {name} is none of the study's{errors.hint(name, study.methods)} It has {', '.join(study.methods)}."
                )
        study = replace(study, methods={name: study.methods[name] for name in options.methods})
    out = Path(options.out) if options.out else Path("runs/studies") / study.name
    count = counting(out / "counts.json")
    if options.plan:
        _say_plan(study, count)
        return
    if options.report:
        if not (out / "results.json").is_file():
            raise errors.ConfigError(f"There are no results in {out}; run the study first.")
        record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    else:
        try:
            engine = (
                on_this_machine(options.jobs)
                if options.ray is None
                else on_ray(None if options.ray == "local" else options.ray)
            )
        except ModuleNotFoundError as error:
            raise errors.ConfigError(str(error)) from error
        record = run_study(study, out, count, engine, lambda line: print(line, flush=True))
    try:
        written = write_study(record, out / "report")
    except ModuleNotFoundError as error:
        raise errors.ConfigError(str(error)) from error
    print("\n" + markdown(record, rows(record)))
    print(f"Report: {out / 'report' / 'index.html'} and {len(written) - 1} files beside it")
    if any(result["status"] == "failed" for result in record["results"]):
        raise SystemExit(1)


def _say_plan(study: Any, count: Any) -> None:
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


def counting(file: Path) -> Any:
    """A count of what trains in adapters, by `plan`; what was counted is kept in a file."""
    import hashlib

    import yaml

    from adaptrank.artifacts.run import write_json
    from adaptrank.cli.plan import describe
    from adaptrank.studies import without_replays

    known: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def count(config: Mapping[str, Any]) -> int:
        plain = {
            key: value
            for key, value in config.items()
            if key in ("model", "data", "seed_everything")
        }
        plain = without_replays(plain)  # a pattern that is not found yet leaves the count as it is
        key = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()
        if key not in known:
            with tempfile.TemporaryDirectory() as folder:
                made = Path(folder) / "config.yaml"
                made.write_text(yaml.safe_dump(plain), encoding="utf-8")
                try:
                    described = describe(["--config", str(made)])
                except errors.ConfigError as error:
                    raise UserError(str(error)) from error
            known[key] = sum(described["layers"].values())
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
        return known[key]

    return count
