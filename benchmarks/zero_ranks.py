"""Cost of layers at rank zero: time, bytes kept for the backward pass, operations.

    python benchmarks/zero_ranks.py [--rounds 15] [--blocks 8] [--tokens 128]

- Model: blocks of SmolLM2's shapes in bf16, 4 rows of tokens. "a quarter" has LoRA of rank 8 on all
  linear layers of the last quarter of the blocks. "zeros" has LoRA on all linear layers, and those
  of the other three quarters have no units. "all" has rank 8 everywhere. A step is forward,
  backward, clipping and fused AdamW. The floor is a forward and a backward pass without an adapter.
- Operations: those that PyTorch dispatches in a forward and a backward pass of one linear layer,
  frozen, with an adapter of each method, and with that adapter without units.

Ratios are taken within a round. The script writes benchmarks/results/zero_ranks.json and
docs/results/zero_ranks.md.
"""

import argparse
from typing import Any

import common
import growth
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptrank import PARAMETERIZATIONS, adapt
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import Parameterization


def models(blocks: int) -> dict[str, nn.Module]:
    """Return the variants."""
    quarter = rf"layers\.({'|'.join(str(i) for i in range(3 * blocks // 4, blocks))})\..*_proj"
    built = {
        "floor": growth.llama(blocks),
        "a quarter": growth.perturbed(adapt(growth.llama(blocks), quarter, growth.lora())),
        "zeros": growth.perturbed(adapt(growth.llama(blocks), "all-linear", growth.lora())),
        "all": growth.perturbed(adapt(growth.llama(blocks), "all-linear", growth.lora())),
    }
    with_units = set(rank_axes(built["a quarter"]))
    for key, axis in rank_axes(built["zeros"]).items():
        if key not in with_units:
            axis.resize([])
    return built


def steps(blocks: int, rounds: int, tokens: int) -> dict[str, dict[str, Any]]:
    """Return time, kept bytes and trained numbers of each variant."""
    built = models(blocks)
    x = growth.inputs(built["floor"], 4, tokens)
    seconds = common.interleaved(
        {name: growth.step(model, x) for name, model in built.items()}, rounds, warm=2
    )
    return {
        name: {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "kept": growth.kept(model, x),
            "ms": common.quartiles([1000 * second for second in seconds[name]]),
            "to_floor": common.ratios(seconds, name, "floor"),
            "to_quarter": common.ratios(seconds, name, "a quarter"),
        }
        for name, model in built.items()
    }


class _Count(TorchDispatchMode):
    """Count the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _operations(layer: nn.Module) -> int:
    x = torch.randn(8, 48, requires_grad=True)
    with _Count() as counted:
        layer(x).sum().backward()
    return counted.count


def operations() -> dict[str, dict[str, int]]:
    """Return the operations of each method that a layer without units leaves idle."""
    found = {}
    plain = nn.Linear(48, 24).requires_grad_(False)
    for name in PARAMETERIZATIONS:
        method = PARAMETERIZATIONS[name]
        if not method.wraps(plain):
            continue
        layer: Parameterization = method(nn.Linear(48, 24))
        with_units = _operations(layer)
        for axis in rank_axes(layer).values():
            axis.resize([])
        if layer.idle:
            found[name] = {
                "frozen": _operations(plain),
                "with units": with_units,
                "without": _operations(layer),
            }
    return found


def page(found: dict[str, Any]) -> str:
    rows = []
    for name, figures in found["steps"].items():
        times = common.spread(figures["ms"]), common.spread(figures["to_quarter"])
        rows.append([name, f"{figures['trained']:,}", f"{figures['kept']:,}", *times])
    counts = [
        [name, *(str(figures[key]) for key in ("frozen", "with units", "without"))]
        for name, figures in found["operations"].items()
    ]
    text = [
        "# Layers at rank zero",
        common.paragraph(
            "This page is written by `python benchmarks/zero_ranks.py`, which explains the",
            "measurement.",
        ),
        common.on(found["machine"]),
        common.paragraph(
            f"{found['blocks']} blocks of SmolLM2's shapes in bf16,",
            f"with 4 x {found['tokens']} tokens. The times are medians and quartiles of",
            f"{found['rounds']} interleaved rounds. Three quarters of the layers of",
            '"zeros" have no units. It should be at "a quarter", whose other layers have no',
            "adapter.",
        ),
        common.table(["", "trained", "bytes kept", "ms a step", "to a quarter"], rows),
        "## Operations of one layer",
        common.paragraph(
            "Operations of a forward and a backward pass of a linear layer: frozen, with an",
            "adapter, and with the adapter without units.",
        ),
        common.table(["method", "frozen", "with units", "without units"], counts),
    ]
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "machine": common.machine(),
        "rounds": args.rounds,
        "blocks": args.blocks,
        "tokens": args.tokens,
    }
    found |= {
        "steps": steps(args.blocks, args.rounds, args.tokens),
        "operations": operations(),
    }
    common.write("zero_ranks", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
