"""Cost of an optimizer: the time of its step and the memory of its state, against AdamW.

    python benchmarks/optimizer_cost.py [--rounds 8] [--passes 3] [--layers 30]

The model is a Llama of SmolLM2-135M's shapes: random weights, 30 layers, bf16 where the CPU is fast
at it, and LoRA of rank 8, or of rank 64, on all linear layers. A batch has 8 x 128 tokens. The
model makes some forward and backward passes. Then in every round each optimizer steps a copy of the
adapters with the same gradients, so that a slow moment of the machine affects all of them. AdamW is
fused. All times are those of the processor, with one thread, so that other processes count little.
State is counted after the steps. The peak is the most that a step allocates at once, as PyTorch's
CPU allocator reports it.

The script writes benchmarks/results/optimizer_cost.json and docs/results/optimizer_cost.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from layer_cost import allocated, running_peak
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import OPTIMIZERS, adapt, backbones
from adaptrank.parameterizations import LoRA
from adaptrank.testing import perturb

RANKS, BATCH, LENGTH = (8, 64), 8, 128
MIB = 2**20


def build(layers: int, rank: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **common.SHAPES)).to(dtype)
    adapt(model, "all-linear", partial(LoRA, rank=rank))
    for module in model.modules():
        if isinstance(module, LoRA):
            perturb(module, 0.01)
    return model


def adapters(model: nn.Module) -> nn.Module:
    """Return copies of the adapters, around frozen layers that have no weights."""
    copies = nn.ModuleList()
    for module in model.modules():
        if isinstance(module, LoRA):
            m, n = module.shape
            frozen = nn.Linear(n, m, bias=False, device="meta")
            copy = LoRA(frozen, rank=len(module.A))
            copy.A = nn.Parameter(module.A.detach().clone())
            copy.B = nn.Parameter(module.B.detach().clone())
            copies.append(copy)
    return copies


def optimizers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """Return name -> function that makes the optimizer of adapters."""

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    made: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {"AdamW": adamw}
    for name, cls in OPTIMIZERS.items():
        made[name] = partial(cls, lr=1e-4)  # type: ignore[assignment]
    return made


def measure(rank: int, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    model = build(options.layers, rank, dtype)
    batch = torch.randint(49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    sources = [module for module in model.modules() if isinstance(module, LoRA)]
    copies = {name: adapters(model) for name in optimizers()}
    steppers = {name: make(copies[name]) for name, make in optimizers().items()}

    def give_gradients() -> None:
        for layers in copies.values():
            for layer, source in zip(layers, sources, strict=True):
                layer.A.grad, layer.B.grad = source.A.grad, source.B.grad  # type: ignore[union-attr]

    passes: list[float] = []
    for number in range(-1, options.passes):  # the first pass warms up
        model.zero_grad()
        start = time.process_time()
        model(input_ids=batch, labels=batch).loss.backward()
        took = time.process_time() - start
        print(f"rank {rank}, pass {number}: {took:.2f} s", flush=True)
        if number >= 0:
            passes.append(took)
    give_gradients()
    seconds = common.interleaved(
        {name: partial(step_seconds, optimizer) for name, optimizer in steppers.items()},
        options.rounds,
    )
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = statistics.median(passes) + statistics.median(seconds["AdamW"])
    rows = {}
    for name, optimizer in steppers.items():
        rows[name] = {
            "milliseconds": common.quartiles([1000 * s for s in seconds[name]]),
            "share": common.quartiles([100 * s / whole for s in seconds[name]]),
            "numbers": state_numbers(optimizer) / parameters,
            "peak": running_peak(allocated(optimizer.step)),
        }
    return {"parameters": parameters, "pass_seconds": common.quartiles(passes), "rows": rows}


def step_seconds(optimizer: torch.optim.Optimizer) -> float:
    """Make a step and return the seconds of the processor."""
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


def state_numbers(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor))


def page(found: dict[str, Any], options: argparse.Namespace) -> str:
    parts = [
        "# What an optimizer costs",
        common.paragraph(
            f"The model is a Llama of SmolLM2-135M's shapes ({found['layers']} layers, random",
            f"weights, {found['dtype']}) with LoRA on all linear layers. A batch has {BATCH} x",
            f"{LENGTH} tokens. In each of {options.rounds} rounds every optimizer steps a copy of",
            "the adapters with the same gradients. AdamW is fused. Times are those of the",
            "processor with one thread. The tables have medians, and quartiles in brackets. This",
            "page is written by `python benchmarks/optimizer_cost.py",
            f"--rounds {options.rounds} --passes {options.passes} --layers {options.layers}`.",
        ),
        common.on(found["machine"]),
        common.bullets(
            "**Of a step** is the time of the optimizer over that of a forward pass, a backward "
            "pass and a step of AdamW.",
            "**Numbers** are those of the state for each trained parameter.",
            "**Peak** is the most that a step allocates at once, beside the state.",
        ),
    ]
    for rank in RANKS:
        part = found["ranks"][str(rank)]
        seconds = part["pass_seconds"]
        parts += [
            f"## Rank {rank}",
            common.paragraph(
                f"{part['parameters']:,} parameters train. A forward and a backward pass take",
                f"{seconds['median']:.2f} s ({seconds['low']:.2f} to {seconds['high']:.2f}).",
            ),
            common.table(HEADER, [row(name, one) for name, one in part["rows"].items()]),
        ]
    return "\n\n".join(parts) + "\n"


HEADER = ("optimizer", "ms a step", "of a step", "numbers", "peak MiB")


def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    share = "{median:.1f} % ({low:.1f} to {high:.1f})".format(**one["share"])
    time_of_step = "{median:.0f} ({low:.0f} to {high:.0f})".format(**one["milliseconds"])
    return name, time_of_step, share, f"{one['numbers']:.2f}", f"{one['peak'] / MIB:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = backbones.auto_dtype("auto")
    found = {
        "machine": common.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": options.layers,
        "ranks": {str(rank): measure(rank, options, dtype) for rank in RANKS},
    }
    text = page(found, options)
    common.write("optimizer_cost", found, text)
    print(text)


if __name__ == "__main__":
    main()
