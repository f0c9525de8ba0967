"""Profile of a step: operations of the frozen floor and of one method, by PyTorch's profiler.

    python benchmarks/step_profile.py [--method LoRA] [--label now]

The workload is `stack` of training_step.py in bf16. To profile another version of the library, put
it first on PYTHONPATH and give it a label of its own. Every label is a column of
docs/results/step_profile.md. The script also writes benchmarks/results/step_profile.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import common
import torch
import training_step
from torch.profiler import ProfilerActivity, profile

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("_scaled_dot_product",),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::fill_", "aten::empty"),
    "elementwise": (
        "aten::mul",
        "aten::add",
        "aten::sum",
        "aten::addcmul",
        "aten::div",
        "aten::pow",
        "aten::silu",
        "aten::neg",
    ),
    "optimizer": ("aten::_fused", "aten::_foreach", "Optimizer"),
}
STEPS = 5


def operations(run: object) -> dict[str, float]:
    """Return the milliseconds of a step for each group of operations."""
    for _ in range(2):
        run()  # type: ignore[operator]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            run()  # type: ignore[operator]
    found = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in profiler.key_averages():
        group = next(
            (g for g, names in GROUPS.items() if any(n in event.key for n in names)), "other"
        )
        found[group] += event.self_cpu_time_total / 1000 / STEPS
    return {name: round(value, 1) for name, value in found.items()}


def page(found: dict[str, Any]) -> str:
    columns = found["columns"]
    rows = [[group, *(f"{columns[c][group]:.1f}" for c in columns)] for group in [*GROUPS, "other"]]
    rows.append(["all", *(f"{sum(columns[c].values()):.1f}" for c in columns)])
    parts = [
        "# Where a step's time goes",
        common.paragraph(
            "Milliseconds of a training step on 8 layers of SmolLM2-135M's shapes in bf16, with",
            "8 x 128 tokens and rank 8 on all linear layers. The figures are those of PyTorch's",
            f"profiler, as the mean of {STEPS} steps. This page is written by",
            "`python benchmarks/step_profile.py`. *before* is the library before thin products",
            "were computed in one step with the layer's own. The floor makes no optimizer step.",
        ),
        common.on(found["machine"]),
        common.table(["", *columns], rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="LoRA")
    parser.add_argument("--label", default="now")
    options = parser.parse_args()
    file = common.ROOT / "benchmarks" / "results" / "step_profile.json"
    found = json.loads(file.read_text()) if file.is_file() else {"columns": {}}
    variants = training_step.variants("stack", torch.bfloat16, Path(), [options.method])
    for name, run in variants:
        if name in ("floor", options.method):
            label = "floor" if name == "floor" else f"{name}, {options.label}"
            found["columns"][label] = operations(run)
        if name == options.method:
            break
    found["machine"] = common.machine()
    common.write("step_profile", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
