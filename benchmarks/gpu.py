"""Time, kernel launches, synchronizations and memory on one GPU, compared with HF PEFT.

    python benchmarks/gpu.py [--minutes 7.5] [--parts steps-1B ...] [--out FOLDER]

Three Llamas with random weights in bf16 are measured: 135M (SmolLM2's shapes, 8 x 128 tokens), 1B
(hidden size 2048, 16 layers, 8 x 512) and 8B (hidden size 4096, 32 layers, 4 x 512). They have no
head. All linear layers are adapted, with rank 8 where there is a rank.

- The floor is the frozen model: forward and backward, with gradients through the activations. All
  other variants make whole steps: forward, backward, the penalty of the SVD form, clipping at 1,
  fused AdamW, and dropping the gradients. HF PEFT's AdaLoRA adds its penalty to a loss that the
  model returns. Here the model returns none, so PEFT's steps are without it.
- steps: every method in eager mode. In a round every variant makes two steps, without a wait
  between them. Ratios are taken within a round. Kernel launches and synchronizations are counted by
  PyTorch's profiler in one more step. Memory is the peak above the frozen model: activations, the
  adapter, its gradients and the state of the optimizer.
- compiled: the repeated blocks are compiled. The variants are measured one after the other.
- falling: AdaLoRA brings the SVD form from rank 64 to 8 by plain calls, eager and compiled.
- run: a whole run, compared with HF's Trainer. `gpu_parts/whole_run.py` explains it.
- checkpointing: steps with gradient checkpointing.

The parts are measured in the order of their importance until the minutes are over. After each part
the results are written to benchmarks/results/gpu.json and docs/results/gpu.md, below --out. What is
left out is named there. `--tiny` tries every part on a CPU with tiny shapes. `--page` only writes
the page anew.
"""

import argparse
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from gpu_parts import falling, steps, whole_run
from gpu_parts.clock import Deadline
from gpu_parts.measures import Device, one_line
from gpu_parts.page import page
from gpu_parts.settings import FULL, TINY, Settings

FILE = Path("benchmarks") / "results" / "gpu.json"
LEAST = 15.0
"""Seconds without which no part is begun."""


@dataclass(frozen=True)
class Part:
    """One part of the benchmark.

    Args:
        share: largest share of the whole time.
        measure: (device, deadline, settings) -> results.
        needs: modules without which the part is left out.
    """

    share: float
    measure: Callable[[Device, Deadline, Settings], dict[str, Any]]
    needs: Sequence[str] = ()


def eager(size: str, device: Device, deadline: Deadline, settings: Settings) -> dict[str, Any]:
    names = settings.variants if size == "1B" else settings.variants_of_others
    return steps.eager(settings.sizes[size], device, deadline, settings, names)


def checkpointed(device: Device, deadline: Deadline, settings: Settings) -> dict[str, Any]:
    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    size = settings.sizes["1B"]
    return steps.eager(size, device, deadline, settings, settings.checkpointed, prepare)


def compiled(size: str, device: Device, deadline: Deadline, settings: Settings) -> dict[str, Any]:
    return steps.compiled(settings.sizes[size], device, deadline, settings)


def falling_ranks(device: Device, deadline: Deadline, settings: Settings) -> dict[str, Any]:
    return falling.measure(settings.sizes["1B"], device, deadline, settings)


def run(device: Device, deadline: Deadline, settings: Settings) -> dict[str, Any]:
    return whole_run.measure(settings.sizes["1B"], device, deadline, settings)


PARTS = {
    "steps-1B": Part(0.16, partial(eager, "1B"), ("peft",)),
    "compiled-1B": Part(0.26, partial(compiled, "1B"), ("peft",)),
    "steps-135M": Part(0.1, partial(eager, "135M"), ("peft",)),
    "run": Part(0.16, run, whole_run.NEEDS),
    "falling": Part(0.14, falling_ranks, ("lightning",)),
    "checkpointing": Part(0.05, checkpointed, ("peft",)),
    "steps-8B": Part(0.15, partial(eager, "8B"), ("peft",)),
    "compiled-135M": Part(0.2, partial(compiled, "135M"), ("peft",)),
    "compiled-8B": Part(0.2, partial(compiled, "8B"), ("peft",)),
}
"""The parts by importance."""


def measure(
    names: Sequence[str],
    device: Device,
    deadline: Deadline,
    settings: Settings,
    write: Callable[[dict[str, Any]], object],
) -> None:
    """Measure parts one after the other, and write what there is after each one.

    A part that fails says so in the results, and the next one is measured.
    """
    found: dict[str, Any] = {"machine": machine(device), "parts": {}, "left_out": {}}
    for number, name in enumerate(names):
        part = PARTS[name]
        lacking = whole_run.missing(part.needs)
        if lacking:
            found["left_out"][name] = f"{' and '.join(lacking)} is not installed"
        elif number and not deadline.allows(LEAST):
            found["left_out"][name] = "no time was left"
        else:
            begin = deadline.used()
            try:
                result = part.measure(device, deadline.part(part.share), settings)
            except Exception as error:
                found["left_out"][name] = f"it failed: {one_line(error)}"
            else:
                found["parts"][name] = result | {"seconds": round(deadline.used() - begin, 1)}
            device.release()
        print(name, found["left_out"].get(name, "measured"), f"{deadline.used():.0f} s", flush=True)
        found["seconds"] = round(deadline.used(), 1)
        write(found)


def machine(device: Device) -> dict[str, Any]:
    """Describe the device and the versions."""
    name = torch.cuda.get_device_name(device.device) if device.is_cuda else "CPU"
    return common.machine() | {
        "device": name,
        "cuda": torch.version.cuda if device.is_cuda else None,
        "versions": {name: version(name) for name in ("transformers", "peft", "liger_kernel")},
    }


def version(name: str) -> str | None:
    """Return the version of a distribution, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=common.ROOT, help="default: the repository")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--page", action="store_true", help="write the page anew, measure nothing")
    options = parser.parse_args(arguments)
    deadline = Deadline(60 * options.minutes)
    results: dict[str, Any] = json.loads((common.ROOT / FILE).read_text(encoding="utf-8"))

    def write(now: Mapping[str, Any] | None) -> None:
        found = {"earlier": results["earlier"], "now": now}
        common.write("gpu", found, page(found), options.out)

    if options.page:
        write(results["now"])
        return
    if not options.tiny and not torch.cuda.is_available():
        parser.error("There is no CUDA device. Type --tiny to try the parts on a CPU.")
    if options.tiny and options.out.resolve() == common.ROOT.resolve():
        parser.error("--tiny measures nothing of use. Type --out FOLDER to say where to write it.")
    device = Device(torch.device("cpu" if options.tiny else "cuda"))
    measure(options.parts, device, deadline, TINY if options.tiny else FULL, write)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
