"""Measure what a forked process saves a run of a study, over one that imports everything anew.

Usage: python benchmarks/study_start.py [--rounds 5]

The run is configs/smoke.yaml, which trains for a few seconds. Both ways alternate.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from adaptrank.studies import verb_process

CONFIG = Path(__file__).parents[1] / "configs" / "smoke.yaml"


def main() -> None:
    """Time both ways in turn, and print medians and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way (5)")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {"forked": [], "started": []}
    ways = {"forked": verb_process.fork, "started": verb_process.start}
    with tempfile.TemporaryDirectory() as folder:
        fit = ["fit", "--config", str(CONFIG), "--runs", str(Path(folder) / "runs")]
        log = Path(folder) / "log.txt"
        verb_process.fork(["--version"], log)  # starts the server
        for _ in range(rounds):
            for name, run in ways.items():
                begin = time.perf_counter()
                if run(fit, log):
                    raise SystemExit(log.read_text(encoding="utf-8"))
                seconds[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(seconds["forked"], seconds["started"], strict=True)]
    for name, values in seconds.items():
        print(f"{name:8} {statistics.median(values):5.1f} s")
    print(f"ratio    {statistics.median(ratios):5.2f}")


if __name__ == "__main__":
    main()
