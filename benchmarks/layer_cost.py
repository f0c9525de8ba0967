"""Cost of a wrapper: time and memory of one layer, forward and backward, against the frozen layer.

    python benchmarks/layer_cost.py [--rounds 40] [--threads 1]

Every registered method that wraps a linear layer is put on a layer of 768 x 768 with 1024 tokens,
over float32 and over bfloat16, with its default arguments (rank 8 where there is a rank). Other
methods wrap their own example. The input takes a gradient, as within a model.

- Time: in every round the frozen layer and every method run once, so that a slow moment of the
  machine affects all of them. A ratio is taken within a round. The table has medians and quartiles
  over the rounds.
- Memory: the events that PyTorch's CPU allocator reports to torch.profiler. `held` is alive at the
  end of the forward pass, and `peak` is the maximum until the end of the backward pass. Both are
  above those of the frozen layer, and the input is in neither. They are the same in every run. The
  frozen layer must hold what arithmetic says, an output and a gradient, or the script stops.
- The numbers kept for each token are the closed formulas of `cost()`. Inputs that other modules
  keep as well are included.

The script writes benchmarks/results/layer_cost.json and docs/results/layer_cost.md.
"""

import argparse
import gc
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

# The profiler would report every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import common
import torch
from common import quartiles
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from adaptrank import PARAMETERIZATIONS, testing
from adaptrank.parameterizations import Parameterization

SIDE, TOKENS, RANK = 768, 1024, 8
MIB = 2**20


def build(cls: type[Parameterization], base: nn.Module) -> Parameterization:
    """Wrap the layer, and move the method away from its initialization."""
    ranked = "rank" in inspect.signature(cls).parameters
    torch.manual_seed(0)
    layer = cls(base, **({"rank": RANK} if ranked else {}))
    testing.perturb(layer, std=0.01)
    return layer


def linear(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(SIDE, SIDE).to(dtype).requires_grad_(False)


def passes(
    module: nn.Module, x: Tensor
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None], Callable[[], None]]:
    """Return functions for a forward pass, a backward pass, and dropping the gradients."""
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    with torch.no_grad():
        weights = torch.randn_like(testing.output(module, x))
    leaves = [x, *module.parameters()]

    def forget() -> None:
        for leaf in leaves:
            leaf.grad = None

    def backward(y: Tensor) -> None:
        # The output of a frozen module that reads tokens takes no gradient.
        if y.requires_grad:
            y.backward(weights)

    return lambda: testing.output(module, x), backward, forget


# ---- time


def seconds(module: nn.Module, x: Tensor) -> Callable[[], float]:
    """Return a function that runs a forward and a backward pass and returns their seconds."""
    forward, backward, forget = passes(module, x)

    def run() -> float:
        start = time.perf_counter()
        backward(forward())
        end = time.perf_counter()
        forget()
        return end - start

    run()
    return run


def time_ratios(
    frozen: nn.Module, layers: dict[str, Parameterization], x: Tensor, rounds: int
) -> dict[str, Any]:
    """Return the quartiles of each method's time over that of the frozen layer.

    The entry "" holds the milliseconds of the frozen layer.
    """
    runs = {name: seconds(module, x) for name, module in {"": frozen, **layers}.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        took = {name: run() for name, run in runs.items()}
        for name, spent in took.items():
            found[name].append(1000 * spent if name == "" else spent / took[""])
    return {name: quartiles(values) for name, values in found.items()}


# ---- memory


def memory(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return (held, peak) in bytes.

    Held bytes are alive after the forward pass. The peak is the maximum until the end of the
    backward pass.
    """
    forward, backward, forget = passes(module, x)
    # Tensors that are made once and kept are no activations.
    backward(forward())
    forget()
    output = []
    forwards = allocated(lambda: output.append(forward()))
    output.clear()

    def both() -> None:
        backward(forward())
        forget()

    events = allocated(both)
    if sum(events):
        raise RuntimeError(
            f"{type(module).__name__}: a pass leaves {sum(events)} bytes more than were alive "
            "before."
        )
    return sum(forwards), running_peak(events)


def allocated(function: Callable[[], object]) -> list[int]:
    """Return the bytes that are allocated (above 0) and freed (below 0) on the CPU, in order."""
    # Otherwise older tensors could be freed in between.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def running_peak(events: list[int]) -> int:
    now = peak = 0
    for change in events:
        now += change
        peak = max(peak, now)
    return peak


# ---- the table


def measure(rounds: int) -> dict[str, Any]:
    """Measure every method, and return plain data."""
    random = torch.Generator().manual_seed(0)
    methods = {
        name: cls
        for name, cls in PARAMETERIZATIONS.items()
        if cls.__module__.startswith("adaptrank.")
    }
    on_linear = [name for name, cls in methods.items() if cls.wraps(nn.Linear(SIDE, SIDE))]
    rows: dict[str, dict[str, Any]] = {name: {"linear": name in on_linear} for name in methods}
    frozen: dict[str, Any] = {}
    for dtype_name, dtype in common.DTYPES.items():
        plain, built = linear(dtype), {}
        for name in on_linear:
            try:
                built[name] = build(methods[name], linear(dtype))
            except ValueError as error:
                rows[name]["refused"] = str(error)
        x = torch.randn(TOKENS, SIDE, generator=random).to(dtype)
        held, peak = memory(plain, x)
        output = TOKENS * SIDE * dtype.itemsize
        # The output, the input's gradient, and oneDNN's scratch, which grows with the threads.
        if held != output or not 0 <= peak - 2 * output < 0.1 * output * torch.get_num_threads():
            raise RuntimeError(
                f"The allocator's report cannot be trusted: it has {held} and {peak} bytes for a "
                "frozen layer."
            )
        groups = [(plain, built, x)]
        for name in sorted(methods.keys() - set(on_linear)):
            torch.manual_seed(0)
            own = build(methods[name], methods[name].example().to(dtype))
            groups.append((own.base, {name: own}, own.example_input((TOKENS,), random)))
        for base, layers, sample in groups:
            times = time_ratios(base, layers, sample, rounds)
            held, peak = memory(base, sample)
            of_frozen = {"milliseconds": times.pop(""), "held": held, "peak": peak}
            if base is plain:
                frozen[dtype_name] = of_frozen
            for name, layer in layers.items():
                has = memory(layer, sample)
                rows[name][dtype_name] = {
                    "time": times[name],
                    "held": has[0] - held,
                    "peak": has[1] - peak,
                }
                if base is not plain:
                    rows[name][dtype_name]["frozen"] = of_frozen
                    rows[name]["example"] = type(base).__name__
                    rows[name]["reads_tokens"] = not sample.is_floating_point()
                rows[name]["parameters"] = sum(p.numel() for p in testing.trainable(layer).values())
                cost = layer.cost()
                rows[name]["cost"] = None if cost is None else vars(cost)
    return {
        "machine": common.machine(),
        "rounds": rounds,
        "tokens": TOKENS,
        "side": SIDE,
        "frozen": frozen,
        "methods": rows,
    }


def page(found: dict[str, Any]) -> str:
    """Write the results as a page of the documentation."""
    here, frozen = found["machine"], found["frozen"]
    ordered = sorted(
        (name for name in found["methods"] if "fp32" in found["methods"][name]),
        key=lambda name: found["methods"][name]["fp32"]["time"]["median"],
    )
    on_linear = [
        row(name, found["methods"][name]) for name in ordered if found["methods"][name]["linear"]
    ]
    others = [
        row(name, found["methods"][name])
        for name in ordered
        if not found["methods"][name]["linear"]
    ]
    tokens = [name for name, one in found["methods"].items() if one.get("reads_tokens")]
    refused = [
        f"{name} is left out: {r['refused']}"
        for name, r in found["methods"].items()
        if "refused" in r
    ]
    floors = []
    for dtype in common.DTYPES:
        median, peak = frozen[dtype]["milliseconds"]["median"], frozen[dtype]["peak"] / MIB
        floors.append(f"{median:.1f} ms in {dtype} ({peak:.1f} MiB at its peak)")
    command = f"--rounds {found['rounds']} --threads {here['threads']}"
    parts = [
        "# Cost of one layer",
        common.paragraph(
            f"Every method wraps a frozen linear layer of {SIDE} x {SIDE} with {TOKENS} tokens.",
            "Its forward and backward pass is compared with that of the frozen layer, whose input",
            f"takes a gradient as well: {' and '.join(floors)}. Arguments are at their defaults,",
            f"but the rank is {RANK} where there is a rank. This page is written by `python",
            f"benchmarks/layer_cost.py {command}`.",
        ),
        common.on(here),
        common.bullets(
            "**FLOPs** are those of the matrix products of a forward pass, for each token and "
            "once a call. **Kept** is the number of values that each token keeps for the backward "
            "pass. The input of the layer is included where the method needs it. Both are closed "
            "formulas, which the tests measure.",
            "**Time** is the ratio to the frozen layer within a round. The table has the median of "
            f"{found['rounds']} rounds with its quartiles.",
            "**Held** and **peak** are MiB that PyTorch's CPU allocator reports above the frozen "
            "layer. Held memory is alive between forward and backward, and adds up over the "
            "layers of a model. The peak is the maximum at any moment of this one layer, and does "
            "not add up. The input, which was there before, counts in neither. A copy of it in "
            "another dtype does, and a gradient of the adapter counts in the peak.",
        ),
        common.table(HEADER, on_linear),
    ]
    if others:
        parts += [
            common.paragraph(
                "The other methods wrap their own small example. It has",
                f"{TOKENS} rows of input, and the comparison is with that example frozen.",
            ),
            common.table(HEADER, others),
        ]
    if tokens:
        parts += [
            common.paragraph(
                f"The frozen example of {', '.join(tokens)} reads tokens, so that it has no",
                "backward pass. The ratio is to its forward pass.",
            )
        ]
    return "\n\n".join([*parts, *refused]) + "\n"


def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    cost = one["cost"] or {}
    figures = [f"{cost[key]:,}" if cost else "not said" for key in ("flops", "flops_once", "kept")]
    times = [common.spread(one[dtype]["time"]) for dtype in common.DTYPES]
    bytes_ = [
        f"{one[dtype][what] / MIB:.2f}" for what in ("held", "peak") for dtype in common.DTYPES
    ]
    example = f" on `{one['example']}`" if "example" in one else ""
    return f"{name}{example}", f"{one['parameters']:,}", *figures, *times, *bytes_


HEADER = (
    *("method", "parameters", "FLOPs/token", "FLOPs/call", "kept/token", "time fp32", "time bf16"),
    *("held fp32", "held bf16", "peak fp32", "peak bf16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args.rounds)
    common.write("layer_cost", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
