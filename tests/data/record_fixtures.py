"""Record the adapters, checkpoints and outcomes that `tests/test_fixtures.py` compares with.

    PYTHONPATH=.:tests python tests/data/record_fixtures.py FOLDER

The files in this folder were recorded with version 0.1.0 of adaptrank, on a CPU. Record them again
only where numbers are meant to change, and say so in the changelog.

    adapters/CASE/               what `save_adapter` writes
    adapters/outputs.safetensors input and output of every case
    checkpoints/CASE.pt.gz       {"checkpoint": state after step 5, "outcome": state at the end}
    checkpoints/CASE.ckpt.gz     a checkpoint of Lightning, whose outcome is in CASE.pt.gz
"""

import copy
import gzip
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fixture_cases import (
    ADAPTER_CASES,
    ALLOCATOR_CASES,
    LIGHTNING_CASES,
    STOP,
    TOTAL,
    Module,
    Run,
    SaveOnce,
    adapted_of,
    first_tensor,
    fit,
    input_of,
    lightning_outcome,
)
from safetensors.torch import save_file

from adaptrank import save_adapter


def record_adapters(folder: Path) -> None:
    """Save the adapter of every case, and what the adapted model computes."""
    tensors = {}
    for case in ADAPTER_CASES:
        model = adapted_of(case)
        save_adapter(model, folder / case)
        tensors[f"{case}.input"] = input_of(case)
        with torch.no_grad():
            tensors[f"{case}.output"] = first_tensor(model(input_of(case))).contiguous()
    save_file(tensors, folder / "outputs.safetensors")


def record_runs(folder: Path) -> None:
    """Save the checkpoint and the outcome of a run of every allocator."""
    for case in ALLOCATOR_CASES:
        torch.manual_seed(0)
        run = Run(case)
        run.start()
        run.train(until=STOP)
        checkpoint = copy.deepcopy(run.checkpoint())
        run.train(until=TOTAL)
        run.finish()
        save(folder / f"{case}.pt.gz", {"checkpoint": checkpoint, "outcome": run.outcome()})


def record_lightning(folder: Path) -> None:
    """Save a checkpoint of Lightning's Trainer, and the outcome of its run."""
    for case, make in LIGHTNING_CASES.items():
        torch.manual_seed(0)
        module, allocator = Module(), make()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "run.ckpt"
            trainer = fit(module, [allocator, SaveOnce(str(path))], root=scratch)
            (folder / f"{case}.ckpt.gz").write_bytes(compressed(path.read_bytes()))
        save(folder / f"{case}.pt.gz", {"outcome": lightning_outcome(module, allocator, trainer)})


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a compressed file that `torch.load(weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(compressed(buffer.getvalue()))


def compressed(content: bytes) -> bytes:
    """Compress without a time stamp."""
    return gzip.compress(content, mtime=0)


def main() -> None:
    """Record everything into the folder that was named."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for room in ("adapters", "checkpoints"):
        (folder / room).mkdir(parents=True, exist_ok=True)
    record_adapters(folder / "adapters")
    record_runs(folder / "checkpoints")
    record_lightning(folder / "checkpoints")


if __name__ == "__main__":
    main()
