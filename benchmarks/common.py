"""Shared parts of the benchmarks: interleaved rounds, quartiles, tables, pages, results."""

import json
import os
import platform
import re
import statistics
import textwrap
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
"""Sizes of SmolLM2-135M. The number of layers is left to the benchmark."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and both quartiles."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def interleaved(
    runs: Mapping[str, Callable[[], float]],
    rounds: int,
    warm: int = 1,
    enough: Callable[[float], bool] = lambda seconds: False,
) -> dict[str, list[float]]:
    """Return the seconds of every variant in each round, by its name.

    Every variant runs once in a round, so that a slow moment of the machine affects all of them.
    The order rotates from round to round.

    Args:
        runs: variants, each of which returns its seconds.
        rounds: rounds that are measured.
        warm: rounds before them.
        enough: whether to stop before another round, given the seconds of the last one.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm, rounds):
        start = time.perf_counter()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = runs[name]()
            if number >= 0:
                seconds[name].append(took)
        if number >= 0 and enough(time.perf_counter() - start):
            break
    return seconds


def step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    after_backward: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """Return a function that makes one training step and returns its seconds.

    A model without trainable parameters makes a forward and a backward pass only.
    """
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
    """Return the quartiles of the ratio of two variants, taken within each round."""
    return quartiles([a / b for a, b in zip(seconds[name], seconds[over], strict=True)])


def spread(ratio: Mapping[str, float] | None) -> str:
    """Write quartiles as "median (low to high)"."""
    return "" if ratio is None else "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def paragraph(*sentences: str) -> str:
    """Join sentences and wrap them at 100 columns."""
    return wrapped(" ".join(sentences), "", "")


def bullets(*items: str) -> str:
    """Write a Markdown list whose items are wrapped at 100 columns."""
    return "\n".join(wrapped(item, "- ", "  ") for item in items)


def wrapped(text: str, first: str, others: str) -> str:
    """Wrap a text at 100 columns without breaking words or code spans."""
    joined = re.sub("`[^`]+`", lambda span: span[0].replace(" ", "\0"), text)
    lines = textwrap.fill(
        joined,
        100,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace("\0", " ")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table with numbers on the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> dict[str, Any]:
    """Describe the processor and the versions of this process."""
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
    """Write the machine in one line."""
    processor = f"{here['processor']}, {here['cores']} cores, {here['threads']} threads"
    return f"{processor}. Python {here['python']}, PyTorch {here['torch']}."


def write(name: str, found: Mapping[str, Any], page: str | None = None, root: Path = ROOT) -> None:
    """Write the results to benchmarks/results/NAME.json, and a page to docs/results/NAME.md.

    Both are below `root`. A file is replaced as a whole.
    """
    files = {root / "benchmarks" / "results" / f"{name}.json": json.dumps(found, indent=1) + "\n"}
    if page is not None:
        files[root / "docs" / "results" / f"{name}.md"] = page
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)
