"""Two processes on a CPU (gloo) are one process with the whole batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from adaptrank.training.distributed import keep_apart

SCRIPT = Path(__file__).with_name("distributed_runs.py")
NAMES = (
    "adalora",
    "hard",
    "elalora",
    "hybrid",
    "emptied",
    "head",
    "rite",
    "activations",
    "inputs",
    "sora",
    "beamlora",
    "dylora",
    "ablation",
    "hessian",
    "variance",
    "directions",
)
STRATEGIES = ("relora", "rac_lora", "xgblora", "sd_lora")
LAST = {"dylora": 12, "directions": 0}
"""The step of the last event of those that act at the end, or at the start, alone."""


class Launcher:
    """Starts the processes of runs, as an outside launcher would.

    The processes of each rank are forked from a process of their own, which has imported the
    packages. Names hash differently on the two ranks, as they do in processes that share nothing.
    """

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.parents = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]

    def finished(self, folder, names, *worlds, **more):
        """Return (process number, exit code, output) of each process of runs of these sizes."""
        asked = [[], []]
        for world in worlds:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            for rank in range(world):
                environment = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "GROUP_RANK": 0,
                    "WORLD_SIZE": world,
                    "LOCAL_WORLD_SIZE": world,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "TORCHELASTIC_RUN_ID": "test",
                    "GLOO_SOCKET_IFNAME": "lo",
                    **more,
                }
                asked[rank].append(
                    {
                        "environment": {key: str(value) for key, value in environment.items()},
                        "arguments": [str(folder), *names],
                        "output": str(folder / f"{world}.{rank}.log"),
                    }
                )
        for parent, processes in zip(self.parents, asked, strict=True):
            print(json.dumps(processes), file=parent.stdin, flush=True)
        ended = []
        for parent, processes in zip(self.parents, asked, strict=True):
            answers = json.loads(parent.stdout.readline())
            for (number, code), process in zip(answers, processes, strict=True):
                ended.append((number, code, Path(process["output"]).read_text()))
        return ended

    def close(self):
        for parent in self.parents:
            parent.communicate()


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, launcher):
    """What all scenarios leave, of one process and of two."""
    folder = tmp_path_factory.mktemp("runs")
    for _, code, output in launcher.finished(folder, [*NAMES, *STRATEGIES, "tokens"], 2, 1):
        assert code == 0, output
    return folder


def load(folder, name, world, rank):
    return torch.load(folder / f"{name}.{world}.{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_with_the_whole_batch(folder, name):
    want, events = load(folder, name, 1, 0)
    first, its_events = load(folder, name, 2, 0)
    second, others = load(folder, name, 2, 1)
    assert its_events == others
    assert first.keys() == second.keys() == want.keys()
    assert all(torch.equal(first[key], second[key]) for key in want)
    for have, exact in zip(its_events, events, strict=True):
        for key in ("step", "sizes", "pruned", "grown", "closed", "total"):
            assert have.get(key) == exact.get(key)
    assert max(event["step"] for event in events) == LAST.get(name, 9)
    assert any(event["sizes"] or event.get("closed") for event in events)
    for key, value in want.items():
        torch.testing.assert_close(
            first[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_rounds_of_two_processes_are_those_of_one(folder, name):
    want, events = load(folder, name, 1, 0)
    first, its_events = load(folder, name, 2, 0)
    second, others = load(folder, name, 2, 1)
    assert its_events == others
    assert [event["step"] for event in its_events] == [0, 4, 8]
    assert first.keys() == second.keys() == want.keys()
    assert all(torch.equal(first[key], second[key]) for key in want)
    for have, exact in zip(its_events, events, strict=True):
        for key in ("loss_before", "loss_after"):
            assert have.pop(key, 0) == pytest.approx(exact.pop(key, 0), rel=1e-9)
        assert have == exact
    for key, value in want.items():
        torch.testing.assert_close(
            first[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_a_step_is_the_mean_over_the_tokens_of_both_processes(folder):
    """Batches of unequal length are accumulated, and one process has a batch without a label."""
    want, losses = load(folder, "tokens", 1, 0)
    for rank in (0, 1):
        have, its_losses = load(folder, "tokens", 2, rank)
        assert len(its_losses) == 2
        assert its_losses == pytest.approx(losses, rel=1e-6)
        for key, value in want.items():
            torch.testing.assert_close(have[key], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [*NAMES, *STRATEGIES])
def test_a_resume_is_exact_under_two_processes(folder, name):
    whole, events = load(folder, name, 2, 0)
    for rank in (0, 1):
        resumed, its_events = load(folder, f"{name} resumed", 2, rank)
        assert its_events == events
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, launcher):
    """The same with the frozen weights in shards, FSDP2."""
    folder = tmp_path_factory.mktemp("sharded")
    for _, code, output in launcher.finished(folder, SHARDED, 2, SHARDED="1"):
        assert code == 0, output
    return folder


SHARDED = ("adalora", "emptied", "head")


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("resumed", ["", " resumed"])
def test_sharded_frozen_weights_change_nothing(folder, sharded, name, resumed):
    want, events = load(folder, name, 1, 0)
    for rank in range(2):
        have, its_events = load(sharded, name + resumed, 2, rank)
        assert [event["sizes"] for event in its_events] == [event["sizes"] for event in events]
        assert have.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(have[key], value, rtol=1e-9, atol=1e-9)


def test_a_strategy_that_takes_hold_of_all_parameters_is_refused():
    trainer = SimpleNamespace(strategy=object.__new__(FSDPStrategy))
    with pytest.raises(
        ValueError,
        match=r"FSDPStrategy takes hold of all parameters.*use strategy=ddp, or ModelParallel",
    ):
        keep_apart(trainer)


@pytest.mark.parametrize("dies", [pytest.param(0, marks=pytest.mark.tables), 1])
def test_when_one_process_is_killed_the_other_ends_with_an_error(dies, tmp_path, launcher):
    results = launcher.finished(tmp_path, ["stops", "dies"], 2, DIES=dies)
    killed, code, _ = results[dies]
    assert code == -9, results
    _, code, output = results[1 - dies]
    assert code not in (0, None)
    assert "Error" in output
    assert f"Rank {dies} (process {killed}) of this run is gone: it was killed" in output
    assert f"Rank {1 - dies} cannot go on alone" in output
    # Before that, the NaN of one process stopped both.
    for _, _, output in results:
        (sentence,) = [line for line in output.splitlines() if line.startswith("stopped: ")]
        assert "trained tensors are not finite" in sentence
        assert "between step 0 and step 6" in sentence
