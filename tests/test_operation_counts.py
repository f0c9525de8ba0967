"""Dispatched operations of an adapted layer: what a GPU would launch, counted without one."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MOST = {
    "ALoRE": 22,
    "DecoupledLoRA": 15,
    "DoRA": 25,
    "HyperAdapt": 10,
    "Kronecker": 8,
    "LoKr": 15,
    "LoRA": 10,
    "MELoRA": 16,
    "MiSS": 7,
    "MultiScale": 20,
    "NEAT": 14,
    "NOLA": 36,
    "PiCa": 8,
    "ResidualOffset": 4,
    "SBoRA": 7,
    "SVD": 14,
    "TensorTrain": 22,
    "TensorTrainAdapter": 42,
}
"""Method -> operations of a layer, above which a change of the code has to explain itself."""

OF_PEFT = ("DoRA", "LoKr", "LoRA", "MiSS", "SVD")


@pytest.fixture(scope="module")
def counts() -> Iterator[Any]:
    """The benchmark as a module. Its imports are found in its folder."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import operation_counts

        yield SimpleNamespace(
            floor=operation_counts.floor,
            ours=cache(operation_counts.ours),
            theirs=operation_counts.theirs,
            methods_of_linear_layers=operation_counts.methods_of_linear_layers,
            PEFT=operation_counts.PEFT,
        )
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def floor(counts: Any) -> int:
    return int(counts.floor())


@pytest.mark.parametrize("method", sorted(MOST))
def test_a_layer_launches_few_operations(method: str, counts: Any, floor: int) -> None:
    assert counts.ours((method,), floor) <= MOST[method]


@pytest.mark.parametrize("method", OF_PEFT)
def test_a_layer_launches_fewer_operations_than_that_of_peft(
    method: str, counts: Any, floor: int
) -> None:
    assert counts.ours((method,), floor) < counts.theirs(method, floor)


def test_hyperadapt_launches_no_more_operations_than_lora(counts: Any, floor: int) -> None:
    assert counts.ours(("HyperAdapt",), floor) <= counts.ours(("LoRA",), floor)


def test_every_method_of_linear_layers_has_a_row(counts: Any) -> None:
    assert set(counts.methods_of_linear_layers()) == MOST.keys()
    assert set(OF_PEFT) == counts.PEFT.keys()
