"""All targets in one table, from the results of the other scripts: docs/results/targets.md.

python benchmarks/targets.py
"""

import json
from typing import Any

import common
from training_step import ASKED, FLOOR

DENSE = {
    "Kronecker": "a sum of full-rank products: its gradient takes the product of all outputs with all inputs",
    "NOLA": "draws its random matrices anew, forward and backward; `materialize=True` keeps them",
}

OTHERS = [
    "- **LoRA** on all linear layers is at the line of 1.10, and the **SVD form** in bf16 within its spread of 0.70: what is left are six thin\n"
    "  products a layer, each of which reads an input or a gradient once more.",
    "- **The run at defaults**: both sides pad to the longest of a batch, and attention in bf16, which is the same for both, is a third of the\n"
    "  frozen floor on this processor. Completions are more of these tokens than the third that was asked for, so that the loss without\n"
    "  logits saves less than it would there.",
    "- **Loading an adapter** takes hundreds of milliseconds for 210 layers; where they go was not looked into. Switching takes 4.",
    "- Not measured: the workloads smollm2, minilm and wide of `training_step.py` on this page, and how cost grows with size.",
]


def read(name: str) -> Any:
    file = common.ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def verdict(value: float, asked: float) -> str:
    return "met" if value <= asked else "short"


def main() -> None:
    rows: list[list[str]] = []

    def add(what: str, ratio: dict[str, float] | None, asked: float) -> None:
        if ratio is not None:
            rows.append([what, common.spread(ratio), str(asked), verdict(ratio["median"], asked)])

    steps = read("training_step")["workloads"]
    for workload, by_dtype in steps.items():
        for index, dtype in enumerate(common.DTYPES):
            methods = by_dtype.get(dtype, {"methods": {}})["methods"]
            for name, asked in ASKED.items():
                label = "AdaLoRA's SVD form" if name == "SVD" else name
                add(f"1. {label} over PEFT's, {workload}, {dtype}", methods.get(name, {}).get("peft"), asked[index])
        methods = by_dtype.get("bf16", {"methods": {}})["methods"]
        for name, row in methods.items():
            if name != "full" and not name.startswith("PEFT"):
                add(f"2. {name} over the floor, {workload}, bf16", row["floor"], FLOOR.get(name, 1.5))
    run = read("fine_tuning_run")
    if run is not None:
        for name, asked in (("defaults", 0.5), ("best", 0.7)):
            add(f"3. run, {name}, time", run["ratios"][name]["seconds"], asked)
        for name in ("defaults", "best"):
            add(f"4. run, {name}, memory", run["ratios"][name]["bytes"], 0.6)
        worst = max(abs(a - b) for a, b in zip(run["curves"]["ours"], run["curves"]["theirs"], strict=True))
        rows.append(["3. largest difference of losses, float32", f"{worst:.1e}", "1e-4", verdict(worst, 1e-4)])
    waiting = read("waiting")
    if waiting is not None:
        values = list(waiting["measured"].items())
        for (what, value), number, asked in zip(values, "667777", (0.5, 1.2, 1000, 1000, 1000, 2), strict=True):
            add(f"{number}. {what}", value, asked)
    short = [f"- **{name}** above 1.5: {why}." for name, why in DENSE.items()]
    short += OTHERS
    page = "\n\n".join(
        [
            "# Targets",
            "What was asked of speed and memory, and what is measured: medians, with quartiles in brackets. The scripts in `benchmarks/` write the\n"
            "figures, each on a page of its own, and `python benchmarks/targets.py` this table. What allocators cost (target 5) is on\n"
            "[a page of its own](allocator_cost.md), and what falling ranks free on [another](rank_memory.md).",
            common.on(read("training_step")["machine"]),
            common.table(["target", "measured", "asked, at most", ""], rows),
            "## Where it falls short, and why",
            "\n".join(short),
        ]
    )
    (common.ROOT / "docs" / "results" / "targets.md").write_text(page + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
