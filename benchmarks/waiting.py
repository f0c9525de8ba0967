"""Waiting times beside steps: help, the first step, and saving, loading and merging adapters.

    python benchmarks/waiting.py [--rounds 5]

- help: `python -m adaptrank --help` as a process.
- first step: `fit` on SmolLM2 without validation, from the start of the process to the first
  training step. It is compared with a process that imports torch, Lightning and transformers, and
  loads the same model.
- adapters: LoRA of rank 8 on all linear layers of SmolLM2 in bf16, within one process.

The script writes benchmarks/results/waiting.json and docs/results/waiting.md.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common

LIBRARIES = """
import torch, lightning.pytorch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained({path!r})
AutoModelForCausalLM.from_pretrained({path!r}, dtype=torch.bfloat16)
"""
FIRST_STEP = """
import os
from adaptrank.modules import CausalLM
CausalLM.training_step = lambda *args: os._exit(0)
from adaptrank.cli import main
options = ["--trainer.limit_val_batches=0", "--trainer.default_root_dir", {folder!r}]
main(["fit", "--config", {config!r}, *options])
"""
ASKED = {
    "`--help`, seconds": "0.5",
    "first step, over importing and loading": "1.2",
    "save an adapter, ms": "milliseconds",
    "load an adapter, ms": "milliseconds",
    "switch adapters, ms": "milliseconds",
    "merge SmolLM2, seconds": "2",
}


def process(*arguments: str) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, cwd=common.ROOT
        )
        return time.perf_counter() - start

    return run


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def adapters(rounds: int, folder: str) -> dict[str, dict[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM

    from adaptrank import adapt, backbones, load_adapter, merge, save_adapter, set_enabled, testing
    from adaptrank.parameterizations import LoRA, wrappers

    def build() -> Any:
        model = backbones.load_model(
            backbones.resolve(common.SMOLLM2), AutoModelForCausalLM, torch.bfloat16
        )
        return model

    model = adapt(build(), "all-linear", partial(LoRA, rank=8))
    for wrapper in wrappers(model):
        testing.perturb(wrapper, 0.01)
    found: dict[str, list[float]] = {"save": [], "load": [], "switch": [], "merge": []}
    for number in range(rounds):
        found["save"].append(1000 * timed(lambda n=number: save_adapter(model, f"{folder}/{n}")))
    for number in range(rounds):
        other = build()
        found["load"].append(
            1000 * timed(lambda o=other, n=number: load_adapter(o, f"{folder}/{n}", name="a"))
        )
        load_adapter(other, f"{folder}/{number}", name="b")
        for name in ("a", "b"):
            found["switch"].append(1000 * timed(lambda o=other, n=name: set_enabled(o, n)))
        set_enabled(other, "a")
        found["merge"].append(timed(lambda o=other: merge(o)))
    return {name: common.quartiles(values) for name, values in found.items()}


def page(found: dict[str, Any]) -> str:
    rounds = found["rounds"]
    rows = [[name, common.spread(value), ASKED[name]] for name, value in found["measured"].items()]
    parts = [
        "# What else one waits for",
        common.paragraph(
            f"SmolLM2-135M, with medians and quartiles of {rounds} rounds. This page is",
            f"written by `python benchmarks/waiting.py --rounds {rounds}`. The script",
            "explains each line.",
        ),
        common.on(found["machine"]),
        common.table(["what", "measured", "asked, at most"], rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from adaptrank import backbones

    path = str(backbones.resolve(common.SMOLLM2).path)
    with tempfile.TemporaryDirectory() as folder:
        config = str(common.ROOT / "configs" / "lora_llama.yaml")
        runs = {
            "help": process("-m", "adaptrank", "--help"),
            "libraries": process("-c", LIBRARIES.format(path=path)),
            "first step": process("-c", FIRST_STEP.format(config=config, folder=folder)),
        }
        seconds = common.interleaved(runs, options.rounds)
        own = adapters(options.rounds, folder)
    measured = dict(
        zip(
            ASKED,
            [
                common.quartiles(seconds["help"]),
                common.ratios(seconds, "first step", "libraries"),
                *own.values(),
            ],
            strict=True,
        )
    )
    found = {"machine": common.machine(), "rounds": options.rounds, "measured": measured}
    common.write("waiting", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
