"""Tests of the processes that a study runs its verbs in."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, forkserver
from types import SimpleNamespace

import pytest

from adaptrank.studies import verb_process

needs_fork = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="This system cannot fork a process.",
)


@pytest.mark.parametrize("run", [pytest.param("fork", marks=needs_fork), "start"])
def test_a_verb_is_logged_and_its_exit_code_is_returned(run, tmp_path):
    log = tmp_path / "log.txt"
    assert getattr(verb_process, run)(["--version"], log) == 0
    assert getattr(verb_process, run)(["methods", "--nothing"], log) == 2
    said, mistake, *_ = log.read_text().splitlines()
    assert said.startswith("adaptrank ")
    assert "--nothing" in mistake


@needs_fork
def test_the_environment_of_now_holds(tmp_path, monkeypatch):
    """A server that started earlier has an older environment."""
    log = tmp_path / "log.txt"
    verb_process.fork(["--version"], log)
    config = tmp_path / "config.yaml"
    config.write_text("model: {class_path: CausalLM}\n")
    monkeypatch.setenv("ADAPTRANK_FIT__SEED_EVERYTHING", "not a seed")
    assert verb_process.fork(["fit", "--config", str(config)], log) == 2
    assert "not a seed" in log.read_text()


@needs_fork
def test_a_start_takes_no_exit_code_away(tmp_path, monkeypatch):
    """A start reads the exit codes of processes that have ended, and each code is there once."""
    has_ended, is_read = threading.Event(), threading.Event()
    wait, read = connection.wait, forkserver.read_signed

    def wait_and_pause(sentinels):
        wait(sentinels)
        if not has_ended.is_set():
            has_ended.set()
            is_read.wait(60)

    def pause_and_read(descriptor):
        if has_ended.is_set():  # before that it reads the number of a process
            is_read.set()
            time.sleep(0.3)
        return read(descriptor)

    monkeypatch.setattr(verb_process, "connection", SimpleNamespace(wait=wait_and_pause))
    monkeypatch.setattr(forkserver, "read_signed", pause_and_read)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(verb_process.fork, ["no-verb"], tmp_path / "first.txt")
        assert has_ended.wait(60)
        # This start finds the first process, whose thread is about to read the exit code.
        assert verb_process.fork(["--version"], tmp_path / "second.txt") == 0
        assert first.result() == 2


@needs_fork
def test_a_killed_process_has_failed(tmp_path, monkeypatch):
    """The exit code of a signal is not 0."""
    monkeypatch.setattr(verb_process, "_run", _end_by_a_signal)
    assert verb_process.fork(["--version"], tmp_path / "log.txt") != 0


def _end_by_a_signal(command, log, environment):
    """Stand in for a verb that the system kills, as it does for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_script_without_a_guard_runs_its_study_once(tmp_path):
    """multiprocessing imports a program again, and would run all of this script."""
    script = tmp_path / "study.py"
    script.write_text(
        "from pathlib import Path\n"
        "from adaptrank.studies.verb_process import run_verb\n"
        "print('code', run_verb(Path('.'), ['--version']))\n"
    )
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["code 0"], done.stderr


@needs_fork
def test_the_command_line_forks(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert not verb_process.is_forked()
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/adaptrank", "compare"])
    assert verb_process.is_forked()
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert not verb_process.is_forked()
