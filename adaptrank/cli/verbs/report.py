"""`report`: draw what an allocator did in a run."""

import argparse
import json
import shlex
from pathlib import Path

DESCRIPTION = """\
Draw what an allocator did in a run: ranks at the start, at the end and over time, the budget, the
scores. The output is PNG files, and one page of HTML that needs nothing else."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/NAME/0")
    out = "for the pictures and the page (RUN/report)"
    parser.add_argument("--out", metavar="FOLDER", help=out)
    as_json = "print the data instead, and write nothing"
    parser.add_argument("--json", action="store_true", help=as_json)


def run(options: argparse.Namespace) -> None:
    """Write the report, and print the largest changes."""
    from adaptrank.reports.escaping import visible
    from adaptrank.reports.history import read_history
    from adaptrank.reports.ranks import write_report

    folder = Path(options.run)
    history = read_history(folder)
    if options.json:
        data = {"events": history.events, "start": history.start, "end": history.end}
        print(json.dumps(data, indent=2))
        return
    pattern = shlex.quote(str(folder / "ranks.json"))
    config = shlex.quote(str(folder / "config.yaml"))
    replay = (
        f"python -m adaptrank fit --config {config} --model.rank_pattern {pattern} --allocator null"
    )
    out = Path(options.out) if options.out else folder / "report"
    written = write_report(history, out, replay)
    change = {axis: history.end.get(axis, size) - size for axis, size in history.start.items()}
    gain = max(change, key=lambda axis: change[axis])
    loss = min(change, key=lambda axis: change[axis])
    start, end = sum(history.start.values()), sum(history.end.values())
    print(f"Report: {written[-1]} and {len(written) - 1} pictures")
    print(f"  units {start:,} -> {end:,} on {len(history.end)} axes")
    if change[gain] > 0:
        print(f"  most gained: {visible(gain)} {change[gain]:+d}")
    if change[loss] < 0:
        print(f"  most lost:   {visible(loss)} {change[loss]:+d}")
    print(f"  replay: {replay}")
