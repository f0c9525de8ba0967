"""What composing takes beside the loaded base: peak memory and time for two LoRAs of rank 64 on SmolLM2-135M, all linear layers.

    python benchmarks/compose_memory.py [--rank 64]

Makes the two adapters with random factors, and composes them in a process of its own, whose resident memory is read after the base was
loaded, and at its peak from there on, writing of the result included. Writes benchmarks/results/compose_memory.json and docs/results/compose_memory.md.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers

from adaptrank import adapt, backbones, compose, save_adapter
from adaptrank.parameterizations import LoRA

ROOT = Path(__file__).parents[1]
BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def base() -> torch.nn.Module:
    source = backbones.resolve(BACKBONE)
    return backbones.load_model(source, transformers.AutoModelForCausalLM, torch.bfloat16)


def memory(field: str) -> float:
    """MiB, of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(one: Path, two: Path, out: Path) -> dict[str, float]:
    model = base()
    small = torch.linalg.svd(torch.randn(8, 8))  # what a first call loads is no memory of ours
    del small
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    start = time.perf_counter()
    report = compose(model, [one, two])
    composed = time.perf_counter()
    save_adapter(model, out)
    return {
        "layers": len(report["layers"]),
        "base": before,
        "peak": memory("VmHWM"),
        "compose_seconds": composed - start,
        "save_seconds": time.perf_counter() - composed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--measure", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("one", "two", "sum")]
        for seed, path in enumerate(paths[:2]):
            torch.manual_seed(seed)
            model = adapt(base(), "all-linear", partial(LoRA, rank=options.rank))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.02)
            save_adapter(model, path)
            del model
        size = sum(file.stat().st_size for path in paths[:2] for file in path.iterdir()) / 2**20
        command = [sys.executable, __file__, "--measure", *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    found |= {"adapters": size, "extra": found["peak"] - found["base"], "rank": options.rank}
    found["ratio"] = found["extra"] / size
    found["torch"], found["python"] = torch.__version__, platform.python_version()
    (ROOT / "benchmarks/results/compose_memory.json").write_text(json.dumps(found, indent=1) + "\n")
    text = f"""# What composing takes

Two LoRAs of rank {options.rank} on all linear layers of SmolLM2-135M, {size:.0f} MiB as files, composed to their exact sum of rank {2 * options.rank} and saved.
Memory above the loaded base, at its peak, saving included: **{found["extra"]:.0f} MiB, {found["ratio"]:.2f} times the size of the two** (asked: below 2).
Composing took {found["compose_seconds"]:.1f} s, with the report of all {found["layers"]} layers; saving {found["save_seconds"]:.1f} s. Written by
`python benchmarks/compose_memory.py`.
"""
    (ROOT / "docs/results/compose_memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
