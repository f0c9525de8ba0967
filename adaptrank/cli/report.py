"""`report`: what an allocator did in a run."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from adaptrank.cli import errors
from adaptrank.cli.verbs import make_parser, run_verb


def report(args: Sequence[str]) -> None:
    """Draw what an allocator did in a run."""
    parser = make_parser(
        "report",
        "Draw what an allocator did in a run: ranks at the start, at the end and over time, the budget, the scores; as PNG and as\n"
        "one page of HTML that needs nothing else.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/NAME/0")
    parser.add_argument(
        "--out", metavar="FOLDER", help="for the pictures and the page (RUN/report)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the data instead, and write nothing"
    )
    run_verb(_report, parser.options(args))


def _report(options: argparse.Namespace) -> None:
    from adaptrank.reports.history import read_history
    from adaptrank.reports.ranks import write_report

    folder = Path(options.run)
    try:
        history = read_history(folder)
    except (FileNotFoundError, ValueError) as error:
        raise errors.ConfigError(str(error)) from error
    if options.json:
        print(
            json.dumps(
                {"events": history.events, "start": history.start, "end": history.end}, indent=2
            )
        )
        return
    pattern, config = (
        shlex.quote(str(folder / "ranks.json")),
        shlex.quote(str(folder / "config.yaml")),
    )
    replay = (
        f"python -m adaptrank fit --config {config} --model.rank_pattern {pattern} --allocator null"
    )
    try:
        written = write_report(
            history, Path(options.out) if options.out else folder / "report", replay
        )
    except ModuleNotFoundError as error:
        raise errors.ConfigError(str(error)) from error
    change = {axis: history.end.get(axis, size) - size for axis, size in history.start.items()}
    gain, loss = max(change, key=lambda a: change[a]), min(change, key=lambda a: change[a])
    print(f"Report: {written[-1]} and {len(written) - 1} pictures")
    print(
        f"  units {sum(history.start.values()):,} -> {sum(history.end.values()):,} on {len(history.end)} axes"
    )
    if change[gain] > 0:
        print(f"  most gained: {gain} {change[gain]:+d}")
    if change[loss] < 0:
        print(f"  most lost:   {loss} {change[loss]:+d}")
    print(f"  replay: {replay}")
