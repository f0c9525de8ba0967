"""`report`: draw what an allocator did in a run, and how accurate it was on each of its tasks."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptrank.reports.history import History
    from adaptrank.reports.task_history import TaskHistory

DESCRIPTION = """\
Draw what an allocator did in a run: ranks at the start, at the end and over time, the budget, the
scores. Of a run over tasks, draw the accuracy on each task after each task. The output is PNG
files, and one page of HTML that needs nothing else."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/NAME/0")
    out = "for the pictures and the page (RUN/report)"
    parser.add_argument("--out", metavar="FOLDER", help=out)
    as_json = "print the data instead, and write nothing"
    parser.add_argument("--json", action="store_true", help=as_json)


def run(options: argparse.Namespace) -> None:
    """Write the report, and print the largest changes."""
    from adaptrank.reports.history import read_history
    from adaptrank.reports.task_history import read_tasks

    folder = Path(options.run)
    out = Path(options.out) if options.out else folder / "report"
    tasks = read_tasks(folder)
    if tasks is not None and not _has_ranks(folder):
        _report_tasks(tasks, out, options.json)
        return
    history = read_history(folder)
    if options.json:
        data = {"events": history.events, "start": history.start, "end": history.end}
        print(json.dumps(data if tasks is None else {**data, **_data(tasks)}, indent=2))
        return
    _report_ranks(history, folder, out)
    if tasks is not None:
        _print_figures(tasks)


def _report_ranks(history: "History", folder: Path, out: Path) -> None:
    from adaptrank.reports.escaping import visible
    from adaptrank.reports.ranks import write_report

    pattern = shlex.quote(str(folder / "ranks.json"))
    config = shlex.quote(str(folder / "config.yaml"))
    replay = (
        f"python -m adaptrank fit --config {config} --model.rank_pattern {pattern} --allocator null"
    )
    written = write_report(history, out, replay)
    change = {axis: history.end.get(axis, size) - size for axis, size in history.start.items()}
    gain = max(change, key=lambda axis: change[axis])
    loss = min(change, key=lambda axis: change[axis])
    start, end = sum(history.start.values()), sum(history.end.values())
    print(f"Report: {written[-1]} and {len(written) - 1} pictures")
    print(f"  units {start:,} -> {end:,} on {len(history.end)} axes")
    parameters = [event["parameters"] for event in history.events if "parameters" in event]
    if history.events and "parameters" in history.events[0]:
        print(f"  parameters of the adapters {parameters[0]:,} -> {parameters[-1]:,}")
    if change[gain] > 0:
        print(f"  most gained: {visible(gain)} {change[gain]:+d}")
    if change[loss] < 0:
        print(f"  most lost:   {visible(loss)} {change[loss]:+d}")
    print(f"  replay: {replay}")


def _report_tasks(tasks: "TaskHistory", out: Path, as_json: bool) -> None:
    """Report a run without an allocator."""
    from adaptrank.reports.tasks import write_task_report

    if as_json:
        print(json.dumps(_data(tasks), indent=2))
        return
    written = write_task_report(tasks, out)
    print(f"Report: {written[-1]} and {len(written) - 1} picture")
    _print_figures(tasks)


def _data(tasks: "TaskHistory") -> dict[str, object]:
    return {"classes": tasks.classes, "accuracy": tasks.accuracy, "figures": tasks.figures}


def _print_figures(tasks: "TaskHistory") -> None:
    from adaptrank.reports.escaping import visible

    for name, value in tasks.figures.items():
        if value is not None:
            print(f"  {visible(name).replace('_', ' ')}: {value:.4f}")


def _has_ranks(folder: Path) -> bool:
    """Return whether a run has ranks to report: an allocator moved them, or rounds state them."""
    return any((folder / name).is_file() for name in ("ranks.jsonl", "rounds.jsonl"))
