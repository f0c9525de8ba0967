"""The page docs/results/gpu.md: tables of what was measured, and of an earlier version."""

from collections.abc import Callable, Mapping
from typing import Any

import common

from gpu_parts.settings import PEFT

Row = Mapping[str, Any]
NONE = "n/a"
EAGER = (
    "method",
    "ms (x floor)",
    "PEFT, ms",
    "ours / PEFT",
    "GPU busy, ms (PEFT)",
    "launches (PEFT)",
    "syncs a step (PEFT)",
    "peak above the model, MiB (PEFT)",
)
LABELS = {"SVD": "SVD form / AdaLoRA"}
GOALS = {
    "LoRA": 0.7,
    "SVD": 0.6,
    "DoRA": 0.7,
    "LoKr": 0.3,
    "MiSS": 0.9,
}
"""Largest ratio to HF PEFT, eager, at 1B."""
FLOOR_GOALS = {"HyperAdapt": 1.3, "NOLA": 3.0}
"""Largest ratio to the floor, eager, at 1B."""
COMPILED_GOALS = {
    "LoRA": 1.15,
    "SVD": 1.15,
    "DoRA": 1.15,
    "MiSS": 1.15,
    "SBoRA": 1.15,
    "HyperAdapt": 1.05,
}
"""Largest ratio to the compiled floor, at 1B."""


def number(value: float | None, digits: int = 0) -> str:
    """Write a figure, or n/a where the device has none."""
    return NONE if value is None else f"{value:,.{digits}f}"


def ratio(found: Mapping[str, float] | None) -> str:
    """Write a ratio, with its quartiles where there are some."""
    if found is not None and "low" not in found:
        return number(found["median"], 2)
    return common.spread(found)


def beside(row: Row, other: Row, key: str) -> str:
    """Write a figure, and that of HF PEFT in brackets."""
    if key not in row:
        return ""
    mine, theirs = number(row[key]), other.get(key)
    return mine if theirs is None else f"{mine} ({number(theirs)})"


def eager_table(rows: Mapping[str, Row]) -> str:
    """Write one row for each of our methods, beside its counterpart."""
    lines = []
    for name, row in rows.items():
        if name.startswith(PEFT):
            continue
        other = rows.get(PEFT + name, {})
        lines.append([LABELS.get(name, name), *eager_cells(row, other)])
    return common.table(EAGER, lines)


def eager_cells(row: Row, other: Row) -> list[str]:
    if "ms" not in row:
        return ["failed", *[""] * (len(EAGER) - 2)]
    floor = "" if "floor" not in row else f" ({row['floor']['median']:.2f})"
    return [
        number(row["ms"]["median"]) + floor,
        number(other["ms"]["median"]) if "ms" in other else "",
        ratio(row.get("peft")),
        *(beside(row, other, key) for key in ("busy_ms", "launches", "syncs", "peak_mib")),
    ]


def compiled_table(rows: Mapping[str, Row]) -> str:
    """Write one row for each compiled variant."""
    header = (
        "method",
        "ms",
        "x compiled floor",
        "graphs",
        "launches",
        "syncs a step",
        "peak above the model, MiB",
        "first step, s",
    )
    lines = []
    for name, row in rows.items():
        if "ms" not in row:
            lines.append([name, "failed", *[""] * 6])
            continue
        cells = [number(row["ms"]["median"], 1), number(row.get("over_floor"), 2)]
        cells += [number(row.get(key)) for key in ("graphs", "launches", "syncs", "peak_mib")]
        lines.append([name, *cells, number(row["first_s"], 1)])
    return common.table(header, lines)


def steps_part(title: str, result: Row, table: Callable[[Mapping[str, Row]], str]) -> list[str]:
    """Write a part about training steps."""
    failed = [
        f"{n}: {r['failed'].rstrip('.')}." for n, r in result["rows"].items() if "failed" in r
    ]
    left = result["left_out"]
    said = [f"Llama {result['size']}."]
    if "rounds" in result:
        said.append(f"Rounds: {result['rounds']}.")
    if left:
        said.append(f"Left out, since the time was over: {', '.join(left)}.")
    return [
        f"### {title}",
        common.paragraph(*said),
        table(result["rows"]),
        *([common.bullets(*failed)] if failed else []),
    ]


def falling_part(title: str, result: Row) -> list[str]:
    start, end = result["ranks"]
    lines, jumps = [], []
    for mode, found in result["modes"].items():
        if "failed" in found:
            lines.append([f"{mode}: {found['failed']}", *[""] * 6])
            continue
        for when in ("before", "after"):
            state = found[when]
            cells = [number(state["ms"], 1), number(state["ranks"]), number(state["different"])]
            cells += [number(state["adapter_mib"], 1), number(state["peak_mib"])]
            lines.append([f"{mode}, {when}", *cells, number(state["graphs"])])
        for event in found["events"]:
            cells = [number(event["ranks"]), number(event["ms"]), number(event["next_ms"])]
            jumps.append([mode, *cells, number(event["graphs"])])
    return [
        f"### {title}",
        common.paragraph(
            f"Llama {result['size']}. AdaLoRA brings the SVD form from rank {start} to a mean of",
            f"{end}. The adapter is its trained tensors and the state of the optimizer. The graphs",
            "of an event are those that the next step compiles.",
        ),
        common.table(
            [
                "",
                "ms a step",
                "ranks",
                "different ranks",
                "adapter, MiB",
                "peak above the model, MiB",
                "graphs so far",
            ],
            lines,
        ),
        common.table(["event", "ranks left", "ms of its step", "ms of the next", "graphs"], jumps),
    ]


def run_part(title: str, result: Row) -> list[str]:
    lines = []
    for way, row in result["rows"].items():
        if "failed" in row:
            lines.append([way, row["failed"], "", ""])
            continue
        over = [f"{common.spread(r)} of {o}" for o, r in row.get("over", {}).items()]
        lines.append(
            [way, common.spread(row["ms"]), number(row["peak_mib"]), *(over or [""])],
        )
    return [
        f"### {title}",
        common.paragraph(
            f"LoRA on a Llama with a head: {result['size']}, with {result['tokens']:.0f} tokens in",
            "a text on average. The loss is that of the completions. The tokens are random, and",
            f"the lengths are drawn like those of gsm8k. Rounds: {result['rounds']}.",
        ),
        common.table(["way", "ms a step", "peak above the model, MiB", "time"], lines),
    ]


def eager_part(title: str, result: Row) -> list[str]:
    return steps_part(title, result, eager_table)


def compiled_part(title: str, result: Row) -> list[str]:
    return steps_part(title, result, compiled_table)


PARTS: dict[str, tuple[str, Callable[[str, Row], list[str]]]] = {
    "steps-135M": ("Training steps, 135M", eager_part),
    "steps-1B": ("Training steps, 1B", eager_part),
    "steps-8B": ("Training steps, 8B", eager_part),
    "compiled-135M": ("Compiled blocks, 135M", compiled_part),
    "compiled-1B": ("Compiled blocks, 1B", compiled_part),
    "compiled-8B": ("Compiled blocks, 8B", compiled_part),
    "checkpointing": ("Gradient checkpointing, 1B", eager_part),
    "falling": ("Ranks that fall, 1B", falling_part),
    "run": ("A whole run, 1B", run_part),
}


def median(row: Row, key: str) -> float | None:
    """Return the median of a figure, None if it was not measured."""
    return row[key]["median"] if key in row else None


def over_lora(rows: Mapping[str, Row]) -> float | None:
    """Return the time of HyperAdapt over that of LoRA."""
    mine, lora = (median(rows.get(name, {}), "ms") for name in ("HyperAdapt", "LoRA"))
    return None if mine is None or lora is None else mine / lora


def goal(what: str, before: float | None, now: float | None, asked: float) -> list[str]:
    """Write a goal, the earlier figure, that of now, and whether it is met."""
    figures = ["" if value is None else f"{value:.2f}" for value in (before, now)]
    met = "not measured" if now is None else "met" if now <= asked else "**short**"
    return [what, *figures, f"{asked:.2f}", met]


def goals(before: Mapping[str, Row], now: Mapping[str, Row], compiled: Mapping[str, Row]) -> str:
    """Write the goals for the 1B model, with what was measured.

    Args:
        before: rows of the eager steps of the earlier version.
        now: rows of the eager steps.
        compiled: rows of the compiled steps.
    """

    def eager(what: str, name: str, key: str, asked: float) -> list[str]:
        figures = [median(rows.get(name, {}), key) for rows in (before, now)]
        return goal(what, *figures, asked)

    lines = [
        eager(f"{LABELS.get(name, name)} over PEFT's", name, "peft", asked)
        for name, asked in GOALS.items()
    ]
    lines.append(goal("HyperAdapt over LoRA", over_lora(before), over_lora(now), 1.0))
    for name, asked in FLOOR_GOALS.items():
        lines.append(eager(f"{name} over the floor", name, "floor", asked))
    for name, asked in COMPILED_GOALS.items():
        value = compiled.get(name, {}).get("over_floor")
        lines.append(goal(f"{name} over the floor, both compiled", None, value, asked))
    return common.table(["goal, 1B", "before", "now", "at most", ""], lines)


def measured(now: Row) -> list[str]:
    """Write everything that was measured."""
    machine = now["machine"]
    versions = [
        f"{name} {number or 'not installed'}" for name, number in machine["versions"].items()
    ]
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    text = [
        "## Measured",
        common.paragraph(
            f"Device: **{machine['device']}**{cuda}. {common.on(machine)} Versions:",
            f"{', '.join(versions)}. All parts took {now['seconds']:.0f} s.",
        ),
    ]
    for name, (title, write) in PARTS.items():
        if name in now["parts"]:
            text += write(title, now["parts"][name])
    left_out = [f"{PARTS[name][0]}: {why.rstrip('.')}." for name, why in now["left_out"].items()]
    if left_out:
        text += ["### Left out", common.bullets(*left_out)]
    return text


def page(found: Row) -> str:
    """Write the page.

    Args:
        found: "now", the results of the last run or None, and "earlier", those before them.
    """
    earlier, now = found["earlier"], found["now"]
    parts = now["parts"] if now else {}
    rows, compiled = (parts.get(name, {}).get("rows", {}) for name in ("steps-1B", "compiled-1B"))
    text = [
        "# On a GPU",
        common.paragraph(
            "Time of training steps on one GPU, over the **frozen floor** (the same model without",
            "an adapter, forward and backward) and over HF PEFT in the same run. Kernel launches",
            "and synchronizations with the device are those of one step. This page is written by",
            "`python benchmarks/gpu.py`, which takes less than eight minutes on one GPU and",
            "explains each part. It needs PEFT, and nothing has to be downloaded.",
        ),
    ]
    if now is None:
        text.append(
            common.paragraph(
                "**The figures below were measured before the changes of this version.** Since",
                "then synchronizations were removed, and a step takes fewer kernels. No GPU was",
                "at hand to measure again. The same command measures all of it.",
            )
        )
    else:
        text += measured(now)
    text += [
        "## Goals",
        common.paragraph(
            "They are ratios on an H100 or H200, for the 1B model with 8 x 512 tokens."
        ),
        goals(earlier["sizes"]["1B"]["rows"], rows, compiled),
        "## Before this version",
        common.paragraph(*earlier["said"]),
    ]
    for size in earlier["sizes"].values():
        text += [common.paragraph(size["said"]), eager_table(size["rows"])]
    return "\n\n".join(text) + "\n"
