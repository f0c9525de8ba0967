"""All targets in one table, from the results of the other scripts: docs/results/targets.md.

python benchmarks/targets.py
"""

import json
from typing import Any

import common
from training_step import ASKED, FLOOR

DENSE = {
    "Kronecker": (
        "is a sum of full-rank products. Its gradient takes the product of all outputs with all "
        "inputs"
    ),
    "NOLA": (
        "draws its random matrices again in each forward and backward pass. `materialize=True` "
        "keeps them"
    ),
}

OTHERS = [
    "**stack** is the workload for which the targets were set. Its ratios move from day to day by "
    "more than their quartiles: DoRA in fp32 was 0.73 when it was first measured and 0.86 later, "
    "with old code and new code alike. The reason was not found. Thin products and scales wait "
    "for memory, which is shared with other programs on the host. DoRA scales every output, "
    "forward and backward, which LoRA does not.",
    "**minilm** has 32 x 20 tokens and small layers. Much of its time is what an adapter costs in "
    "a layer of any size ([growth](growth.md), where tokens are few).",
    "**wide** is the other extreme. Products are nearly all of a step, for PEFT as well, and "
    "little else could be saved.",
    "**Half of the ranks** halves parameters, gradients and optimizer state. Most of what LoRA "
    "keeps for the backward pass is the input of its layers, which does not depend on the rank. "
    "Much of its time is what each layer costs at any rank ([growth](growth.md)).",
    "**Saving and loading** goes through 210 layers in Python, one by one.",
    "**Attention** in bf16 is a quarter of the floor on the processor of the "
    "[profile](step_profile.md), for all libraries. PyTorch's bf16 kernel takes longer there "
    "than its float32 kernel.",
    "**Not done**: one product for several projections of the same input, `torch.compile`, and a "
    "cache of tokenized data sets.",
]

MILLISECONDS = 100
"""Limit for "in milliseconds": a tenth of a second."""


def read(name: str) -> Any:
    file = common.ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def verdict(value: float, asked: float) -> str:
    return "met" if value <= asked else "**short**"


def earlier(workloads: dict[str, Any]) -> str:
    """Return a sentence about the workloads that were not measured again, or ""."""
    old = [name for name, by_dtype in workloads.items() if "note" in by_dtype]
    if not old:
        return ""
    sentence = common.paragraph(
        f"That is the machine of stack. The rows of {', '.join(old)}, and those with the numbers 3",
        "to 7, are from before adapters launched fewer kernels and steps stopped reading the",
        "device (see [operations per adapted layer](operation_counts.md)). Their pages say the",
        "machine.",
    )
    return f"\n\n{sentence}"


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
                add(
                    f"1. {label} over PEFT's, {workload}, {dtype}",
                    methods.get(name, {}).get("peft"),
                    asked[index],
                )
        methods = by_dtype.get("bf16", {"methods": {}})["methods"]
        for name, row in methods.items():
            if name != "full" and not name.startswith("PEFT"):
                add(
                    f"2. {name} over the floor, {workload}, bf16",
                    row["floor"],
                    FLOOR.get(name, 1.5),
                )
    run = read("fine_tuning_run")
    if run is not None:
        for name, asked in (("defaults", 0.5), ("best", 0.7)):
            add(f"3. run, {name}, time", run["ratios"][name]["seconds"], asked)
        for name in ("defaults", "best"):
            add(f"4. run, {name}, memory", run["ratios"][name]["bytes"], 0.6)
        worst = max(
            abs(a - b) for a, b in zip(run["curves"]["ours"], run["curves"]["theirs"], strict=True)
        )
        rows.append(
            [
                "3. largest difference of losses, float32",
                f"{worst:.1e}",
                "1e-4",
                verdict(worst, 1e-4),
            ]
        )
    scores = read("allocator_cost")
    for name, row in scores["ratios"].items() if scores else ():
        if name != "none" and not name.startswith("PEFT"):
            add(f"5. scoring by {name}, share of a step", row["scoring"], 0.03)
            add(f"5. event by {name}, in steps", row["event"], 1.0)
    halved = read("rank_memory")
    if halved is not None:
        whole, left = halved["half"]["rank 64"], halved["half"]["half of it"]
        for what, ratio in (
            ("parameters", left["parameters"] / whole["parameters"]),
            ("activations of its own", left["kept"] / whole["kept"]),
            ("time of its own", left["ms"]["median"] / whole["ms"]["median"]),
        ):
            rows.append(
                [
                    f"5. half of the ranks, {what}",
                    f"{ratio:.2f}",
                    "0.5",
                    verdict(round(ratio, 2), 0.5),
                ]
            )
    waiting = read("waiting")
    if waiting is not None:
        limits = (0.5, 1.2, *[MILLISECONDS] * 3, 2)
        for (what, value), number, asked in zip(
            waiting["measured"].items(), "667777", limits, strict=True
        ):
            add(f"{number}. {what}", value, asked)
    short = [f"**{name}** is above 1.5. It {why}." for name, why in DENSE.items()]
    short += OTHERS
    page = "\n\n".join(
        [
            "# Targets",
            common.paragraph(
                "The targets for speed and memory, and the measured figures: medians, with",
                "quartiles in brackets. The scripts in `benchmarks/` write the figures, each on a",
                "page of its own, and `python benchmarks/targets.py` writes this table. Another",
                "page shows how cost [grows with size](growth.md).",
            ),
            f"{common.on(steps['stack']['machine'])}{earlier(steps)}",
            common.table(["target", "measured", "at most", ""], rows),
            "## Where it falls short, and why",
            common.bullets(*short),
        ]
    )
    (common.ROOT / "docs" / "results" / "targets.md").write_text(page + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
