"""What the scripts here share: rounds in which every variant runs once, their quartiles, the machine, and files of results."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
SMOLLM2, MINILM = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "use_cache": False,
}
"""SmolLM2-135M's, but for the number of layers."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def interleaved(
    runs: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Name -> its seconds in each round. In a round each runs once, so that a slow spell meets all of them; the order turns."""
    names, found = list(runs), {name: [] for name in runs}
    for number in range(-warm, rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            seconds = runs[name]()
            if number >= 0:
                found[name].append(seconds)
    return found


def step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    after_backward: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """A function that makes one step and returns its seconds; where nothing trains, forward and backward alone."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def run() -> float:
        start = time.perf_counter()
        loss().backward()
        if optimizer is not None:
            after_backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return run


def ratios(seconds: Mapping[str, Sequence[float]], name: str, over: str) -> dict[str, float]:
    """Quartiles of the ratio of two variants, taken within a round."""
    return quartiles([a / b for a, b in zip(seconds[name], seconds[over], strict=True)])


def spread(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> dict[str, Any]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def on(here: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return f"{here['processor']}, {here['cores']} cores, {here['threads']} threads; Python {here['python']}, PyTorch {here['torch']}."


def write(name: str, found: Mapping[str, Any], page: str | None = None) -> None:
    """Results as benchmarks/results/<name>.json and, where there is a page, docs/results/<name>.md."""
    files = {ROOT / "benchmarks" / "results" / f"{name}.json": json.dumps(found, indent=1) + "\n"}
    if page is not None:
        files[ROOT / "docs" / "results" / f"{name}.md"] = page
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
