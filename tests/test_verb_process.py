"""Tests of the processes that a study runs its verbs in."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from adaptrank.studies import verb_process


@pytest.fixture(params=["fork", "start"])
def run(request, monkeypatch):
    """A verb in a process of its own, forked from the server or started anew."""
    forked = request.param == "fork"
    if forked and not verb_process.is_forked():
        pytest.skip("No server forks processes on this machine.")
    monkeypatch.setattr(verb_process, "is_forked", lambda: forked)
    return verb_process.run_verb


def test_a_verb_is_logged_and_its_exit_code_is_returned(run, tmp_path):
    assert run(tmp_path, ["--version"]) == 0
    assert run(tmp_path, ["methods", "--nothing"]) == 2
    said, mistake, *_ = (tmp_path / "log.txt").read_text().splitlines()
    assert said.startswith("adaptrank ")
    assert "--nothing" in mistake


def test_the_environment_of_now_holds(run, tmp_path, monkeypatch):
    """A server that started earlier has an older environment."""
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    run(tmp_path / "first", ["--version"])
    config = tmp_path / "config.yaml"
    config.write_text("model: {class_path: CausalLM}\n")
    monkeypatch.setenv("ADAPTRANK_FIT__SEED_EVERYTHING", "not a seed")
    assert run(tmp_path / "second", ["fit", "--config", str(config)]) == 2
    assert "not a seed" in (tmp_path / "second" / "log.txt").read_text()


def test_processes_at_a_time_keep_their_own_exit_codes(tmp_path):
    """A start reads the exit codes of processes that have ended, and each code is there once."""
    if not verb_process.is_forked():
        pytest.skip("No server forks processes on this machine.")
    folders = [tmp_path / str(number) for number in range(12)]
    for folder in folders:
        folder.mkdir()

    def verb(number):
        arguments = ["--version"] if number % 2 else ["no-verb"]
        return verb_process.run_verb(folders[number], arguments)

    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(verb, range(12)))
    assert codes == [2, 0] * 6


def test_a_killed_process_has_failed(tmp_path, monkeypatch):
    """The exit code of a signal is not 0."""
    if not verb_process.is_forked():
        pytest.skip("No server forks processes on this machine.")
    monkeypatch.setattr(verb_process, "_run", _ended_by_a_signal)
    assert verb_process.run_verb(tmp_path, ["--version"]) != 0


def _ended_by_a_signal(command, log, environment):
    """Stand in for a verb that the system kills, as it does for want of memory."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
