"""Time to run `configs/smoke.yaml` as a run of a study: forked, over started anew.

    python benchmarks/study_start.py [--rounds 5]

On a CPU `compare` forks its runs from a server that has imported the libraries once. The script
writes benchmarks/results/study_start.json and docs/results/study_start.md.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common

from adaptrank.studies import verb_process


def timed(run: Callable[[Sequence[str], Path], int], folder: str) -> Callable[[], float]:
    """Return a function that runs one `fit` and returns its seconds."""
    config = str(common.ROOT / "configs" / "smoke.yaml")
    log = Path(folder) / "log.txt"

    def fit() -> float:
        start = time.perf_counter()
        if run(["fit", "--config", config, "--runs", str(Path(folder) / "runs")], log):
            raise SystemExit(log.read_text(encoding="utf-8"))
        return time.perf_counter() - start

    return fit


def page(found: dict[str, Any]) -> str:
    """Write the page of a measurement."""
    rows = [[name, common.spread(value)] for name, value in found["measured"].items()]
    parts = [
        "# Starting the runs of a study",
        common.paragraph(
            "A run of `configs/smoke.yaml` in a process that is forked from a server, as `compare`",
            "does on a CPU, and in a process that imports everything anew. Medians and quartiles",
            f"of {found['rounds']} rounds. This page is written by",
            f"`python benchmarks/study_start.py --rounds {found['rounds']}`.",
        ),
        common.on(found["machine"]),
        common.table(["what", "measured"], rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        ways = {"forked": verb_process.fork, "anew": verb_process.start}
        runs = {name: timed(run, folder) for name, run in ways.items()}
        seconds = common.interleaved(runs, rounds)
    measured = {
        "forked, seconds": common.quartiles(seconds["forked"]),
        "started anew, seconds": common.quartiles(seconds["anew"]),
        "forked, over started anew": common.ratios(seconds, "forked", "anew"),
    }
    found = {"machine": common.machine(), "rounds": rounds, "measured": measured}
    common.write("study_start", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
