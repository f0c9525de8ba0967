"""Processes that run a verb of the command line for a study.

A fit of a small model takes as long to import PyTorch and transformers as to train some dozens of
steps. So the processes are forked from a server that has imported them once.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path

PRELOADED = ["adaptrank.cli.train"]
"""Modules that the server imports."""

_reading = threading.Lock()
"""Held where a process is started or its exit code is read.

A start reads the exit codes of other processes as well, and a code can be read once.
"""


def run_verb(folder: Path, command: Sequence[str]) -> int:
    """Run a verb in a process of its own, log what it prints, and return its exit code.

    Args:
        folder: folder of the point, whose `log.txt` grows.
        command: verb and options.
    """
    log = folder / "log.txt"
    return fork(command, log) if is_forked() else start(command, log)


def is_forked() -> bool:
    """Whether processes are forked from a server.

    A forked process imports the program of this process again. The command line does nothing then,
    but a script of a user may start its study a second time. And a process that was forked after a
    driver of an accelerator was loaded cannot use that accelerator.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods() or not _is_command_line():
        return False
    import torch

    return not torch.accelerator.is_available()


def _is_command_line() -> bool:
    """Whether this process is `python -m adaptrank` or `adaptrank`, and no script of a user."""
    is_module = sys.modules["__main__"].__package__ == "adaptrank"
    return is_module or Path(sys.argv[0]).name == "adaptrank"


def start(command: Sequence[str], log: Path) -> int:
    """Run a verb in a fresh interpreter."""
    with log.open("a", encoding="utf-8") as file:
        finished = subprocess.run(
            [sys.executable, "-m", "adaptrank", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    return finished.returncode


def fork(command: Sequence[str], log: Path) -> int:
    """Run a verb in a process that is forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(list(command), log.resolve(), dict(os.environ)))
    with _reading:
        process.start()
    connection.wait([process.sentinel])
    with _reading:
        process.join()
    return process.exitcode or 0


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run a verb in this process, whose output goes to a file."""
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = ["adaptrank", *command]
    runpy.run_module("adaptrank", run_name="__main__")
