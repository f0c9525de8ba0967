"""Adapters and checkpoints recorded with version 0.1.0 mean today what they meant then."""

import gzip
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_cases import (
    ADAPTER_CASES,
    ALLOCATOR_CASES,
    LIGHTNING_CASES,
    STOP,
    TOTAL,
    Module,
    Run,
    base_of,
    first_tensor,
    fit,
    lightning_outcome,
)
from safetensors.torch import load_file

from adaptrank import load_adapter, save_adapter

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

DATA = Path(__file__).parent / "data"
OUTPUTS = load_file(DATA / "adapters" / "outputs.safetensors")
TOLERANCE = 1e-12
DECISIONS = (
    "step",
    "budget",
    "unit",
    "total",
    "active",
    "allocated",
    "sizes",
    "pruned",
    "grown",
    "closed",
)
"""Keys of an event that are compared exactly. Scores and dimensions may round differently."""


def recorded(case: str) -> dict[str, Any]:
    """Load what was recorded of a run."""
    content = gzip.decompress((DATA / "checkpoints" / f"{case}.pt.gz").read_bytes())
    return torch.load(io.BytesIO(content), weights_only=True)


def decisions(events: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Return the keys of all events that are compared exactly."""
    kept = []
    for of_allocator in events:
        kept.append([{key: event.get(key) for key in DECISIONS} for event in of_allocator])
    return kept


def assert_same_tensors(actual: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """Compare tensors of one name. None may be missing, and none may be new."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same_tensors(actual[key], value)
        else:
            torch.testing.assert_close(actual[key], value, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_outcome(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare events, ranks, and the tensors of the model and its optimizer."""
    assert decisions(actual["events"]) == decisions(expected["events"])
    assert actual["sizes"] == expected["sizes"]
    assert_same_tensors(actual["model"], expected["model"])
    assert_same_tensors(actual["optimizer"], expected["optimizer"])


def test_every_method_was_recorded(method):
    assert (DATA / "adapters" / method.__name__ / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_a_recorded_adapter_computes_the_recorded_output(case):
    model = load_adapter(base_of(case), DATA / "adapters" / case)
    with torch.no_grad():
        output = first_tensor(model(OUTPUTS[f"{case}.input"]))
    torch.testing.assert_close(output, OUTPUTS[f"{case}.output"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_a_recorded_adapter_is_written_again_as_it_was(case, tmp_path):
    model = load_adapter(base_of(case), DATA / "adapters" / case)
    save_adapter(model, tmp_path)
    expected = load_file(DATA / "adapters" / case / "adapter_model.safetensors")
    actual = load_file(tmp_path / "adapter_model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("case", ALLOCATOR_CASES)
def test_a_recorded_checkpoint_goes_on_as_it_did(case):
    record = recorded(case)
    run = Run(case)
    run.restore(record["checkpoint"], STOP)
    run.start()
    run.train(until=TOTAL)
    run.finish()
    assert_same_outcome(run.outcome(), record["outcome"])


@pytest.mark.parametrize("case", ALLOCATOR_CASES)
def test_a_new_run_decides_what_the_recorded_one_did(case):
    run = Run(case)
    run.start()
    run.train(until=TOTAL)
    run.finish()
    expected = recorded(case)["outcome"]
    assert decisions(run.outcome()["events"]) == decisions(expected["events"])
    assert run.outcome()["sizes"] == expected["sizes"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LIGHTNING_CASES)
def test_a_recorded_lightning_checkpoint_goes_on_as_it_did(case, tmp_path):
    path = tmp_path / "run.ckpt"
    path.write_bytes(gzip.decompress((DATA / "checkpoints" / f"{case}.ckpt.gz").read_bytes()))
    module, allocator = Module(), LIGHTNING_CASES[case]()
    trainer = fit(module, [allocator], checkpoint=str(path), root=str(tmp_path))
    assert_same_outcome(lightning_outcome(module, allocator, trainer), recorded(case)["outcome"])
