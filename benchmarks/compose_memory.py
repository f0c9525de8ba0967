"""Memory and time of composing two LoRAs of rank 64 on all linear layers of SmolLM2-135M.

    python benchmarks/compose_memory.py [--rank 64]

The script makes two adapters with random factors, and composes them in a process of its own. It
reads the resident memory of that process after the base was loaded, and its peak from there on.
Writing the result is included. It writes benchmarks/results/compose_memory.json and
docs/results/compose_memory.md.
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

import common
import torch
import transformers

from adaptrank import adapt, backbones, compose, save_adapter
from adaptrank.parameterizations import LoRA

BACKBONE = common.SMOLLM2


def base() -> torch.nn.Module:
    source = backbones.resolve(BACKBONE)
    return backbones.load_model(source, transformers.AutoModelForCausalLM, torch.bfloat16)


def memory(field: str) -> float:
    """Return MiB of this process: VmRSS is the present size, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(one: Path, two: Path, out: Path) -> dict[str, float]:
    model = base()
    # The first call loads a library, which is not part of composing.
    torch.linalg.svd(torch.randn(8, 8))
    before = memory("VmRSS")
    # Start the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
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


def page(found: dict[str, float]) -> str:
    rank, times = found["rank"], f"{found['ratio']:.2f} times the size of the two"
    sentences = common.paragraph(
        f"Two LoRAs of rank {rank} on all linear layers of SmolLM2-135M are",
        f"{found['adapters']:.0f} MiB as files. They are composed to their exact sum of rank",
        f"{2 * rank}, which is saved. The peak of the memory above the loaded base, saving",
        f"included, is **{found['extra']:.0f} MiB, {times}**. The target is below 2. Composing",
        f"took {found['compose_seconds']:.1f} s, with the report of all {found['layers']} layers.",
        f"Saving took {found['save_seconds']:.1f} s. This page is written by `python",
        "benchmarks/compose_memory.py`.",
    )
    return f"# What composing takes\n\n{sentences}\n"


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
    common.write("compose_memory", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
