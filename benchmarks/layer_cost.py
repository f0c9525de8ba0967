"""What a wrapper costs: time and memory of one layer, forward and backward, against the same layer frozen.

    python benchmarks/layer_cost.py [--rounds 40] [--threads 1]

Every registered method that wraps a linear layer is put on one of 768 x 768 with 1024 tokens, over float32 and over bfloat16, at
its default arguments (rank 8 where there is a rank); others on their own example. The input takes a gradient, as within a model.

- Time: in every round the frozen layer and then every method run once, so that a slow spell meets all of them. A ratio is taken
  within a round; the table has medians and quartiles over the rounds.
- Memory: what PyTorch's CPU allocator reports to torch.profiler, event by event. `held` is alive at the end of the forward pass,
  `peak` the most there is until the end of the backward pass; both above the frozen layer's. The input is outside of both. It is
  the same in every run; of the frozen layer it must be what arithmetic says, an output and a gradient, or the script stops.
- Numbers kept for each token are the closed formulas of `cost()`, inputs that others keep as well included.

Writes benchmarks/results/layer_cost.json and docs/results/layer_cost.md.
"""

import argparse
import gc
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports every start and stop

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
    """The method on this layer, away from its start."""
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
    """(forward, backward, forget the gradients) of a module at one input."""
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    with torch.no_grad():
        weights = torch.randn_like(testing.output(module, x))
    leaves = [x, *module.parameters()]

    def forget() -> None:
        for leaf in leaves:
            leaf.grad = None

    def backward(y: Tensor) -> None:
        if y.requires_grad:  # of a frozen module that reads tokens nothing does
            y.backward(weights)

    return lambda: testing.output(module, x), backward, forget


# ---- time


def seconds(module: nn.Module, x: Tensor) -> Callable[[], float]:
    """A function that runs a forward and a backward pass and returns how long they took."""
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
    """Method -> quartiles of its time over the frozen layer's, which stands there under "" with milliseconds."""
    runs = {name: seconds(module, x) for name, module in {"": frozen, **layers}.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        took = {name: run() for name, run in runs.items()}
        for name, spent in took.items():
            found[name].append(1000 * spent if name == "" else spent / took[""])
    return {name: quartiles(values) for name, values in found.items()}


# ---- memory


def memory(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """(held, peak) in bytes: alive after the forward pass, and the most until the end of the backward pass."""
    forward, backward, forget = passes(module, x)
    backward(forward())  # what is made once, and kept, is no activation
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
            f"{type(module).__name__}: {sum(events)} bytes more are alive after a pass than before."
        )
    return sum(forwards), running_peak(events)


def allocated(function: Callable[[], object]) -> list[int]:
    """Bytes taken (above 0) and given back (below) on the CPU while the function runs, in their order."""
    gc.collect()  # or what was there before is given back in between
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
    """Everything, as plain data."""
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
                f"The allocator's report is not to be trusted: {held} and {peak} bytes of a frozen layer."
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
    """The results as a page of the documentation."""
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
    milliseconds = " and ".join(
        f"{frozen[dtype]['milliseconds']['median']:.1f} ms in {dtype} ({frozen[dtype]['peak'] / MIB:.1f} MiB at its peak)"
        for dtype in common.DTYPES
    )
    parts = [
        "# Cost of one layer",
        f"Every method on a frozen linear layer of {SIDE} x {SIDE} with {TOKENS} tokens, forward and backward, against the same layer\n"
        f"frozen, whose input takes a gradient as well: {milliseconds}.\n"
        f"Default arguments, but rank {RANK} where there is a rank. Written by\n"
        f"`python benchmarks/layer_cost.py --rounds {found['rounds']} --threads {here['threads']}`.",
        common.on(here),
        "- **FLOPs** are those of the products of a forward, for each token, and once a call; **kept** is how many numbers each token\n"
        "  keeps for the backward pass, the layer's input included where the method needs it. Both are closed formulas, which the\n"
        "  tests measure.\n"
        f"- **Time** is the ratio to the frozen layer within a round, the median of {found['rounds']} rounds with its quartiles.\n"
        "- **Held** and **peak** are MiB that PyTorch's CPU allocator reports above the frozen layer: alive between forward and backward,\n"
        "  which adds up over the layers of a model; and the most at any moment of this one layer, which does not. The input, which was\n"
        "  there before, counts in neither; a copy of it in another dtype does, and a gradient of the adapter counts in the peak.",
        common.table(HEADER, on_linear),
    ]
    if others:
        parts += [
            f"Methods that wrap something else, each on its own small example with {TOKENS} rows of input, against that example frozen:",
            common.table(HEADER, others),
        ]
    if tokens:
        parts += [
            f"The frozen example of {', '.join(tokens)} reads tokens, so that it has no backward pass: the ratio is to its forward."
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
