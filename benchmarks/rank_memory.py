"""Memory that falling ranks free: adapter parameters, gradients, optimizer state, resident memory.

    python benchmarks/rank_memory.py [--start 64] [--end 8] [--rounds 9]

- Memory: LoRA at the start rank on all linear layers of SmolLM2 trains for a few steps. AdaLoRA
  then prunes in one event to what the end rank costs, and training goes on. Everything is measured
  in one process, between steps, in an ordinary Lightning run.
- Half: 8 blocks of SmolLM2's shapes in bf16 with LoRA of rank 64 and 4 x 128 tokens. The model is
  measured as it is, and after AdaLoRA's plan has pruned half of the ranks by random scores, which
  prune everywhere and unevenly. Time and the bytes kept for the backward pass are those above the
  frozen floor in the same round.

The script writes benchmarks/results/rank_memory.json and docs/results/rank_memory.md.
"""

import argparse
import ctypes
import gc
import logging
from functools import partial
from pathlib import Path
from typing import Any

import common
import growth
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from adaptrank import adapt
from adaptrank.allocation import AdaLoRA
from adaptrank.axes import cost_model, rank_axes
from adaptrank.data import ArithmeticProblems
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import LoRA


def resident() -> int:
    """Return the resident bytes of this process after freed blocks are given back (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Measure(Callback):
    """Record sizes after each backward pass, where gradients are at their largest."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        state = [v for p in parameters for v in optimizer.state[p].values() if torch.is_tensor(v)]
        sizes = {
            "parameters": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer state": sum(v.nbytes for v in state),
            "resident": resident(),
        }
        self.rows.append(sizes)


def memory(start: int, end: int) -> dict[str, Any]:
    """Return the bytes before an event and after it, in a run on SmolLM2."""
    torch.manual_seed(0)
    module = CausalLM(common.SMOLLM2, [Adapter([partial(LoRA, rank=start)])], generate=False)
    module.configure_model()
    budget = cost_model(module).total(dict.fromkeys(rank_axes(module), end))
    measure = Measure()
    allocator = AdaLoRA(
        budget,
        soft=False,
        importance="magnitude",
        unit="parameters",
        every=1,
        warmup=2,
        final=3,
    )
    trainer = Trainer(
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[allocator, measure],
    )
    trainer.fit(module, datamodule=ArithmeticProblems(batch_size=2, train_size=40, val_size=4))
    axes = rank_axes(module)
    return {
        "layers": len(axes),
        "ranks": sum(map(len, axes.values())),
        "before": measure.rows[2],
        "after": measure.rows[-1],
    }


def half(rounds: int) -> dict[str, Any]:
    """Return what an adapter adds to the floor, before and after half of its ranks are pruned."""
    models = {"floor": growth.llama(8)}
    for name in ("rank 64", "half of it"):
        models[name] = growth.perturbed(adapt(growth.llama(8), "all-linear", growth.lora(64)))
    pruned = models["half of it"]
    optimizer = torch.optim.AdamW([p for p in pruned.parameters() if p.requires_grad], lr=0.0)
    count = sum(map(len, rank_axes(pruned).values()))
    allocator = AdaLoRA(count // 2, soft=False, importance="random", every=1, warmup=0, final=1)
    allocator.start(pruned, optimizer, 2)
    x = growth.inputs(pruned, 4, 128)
    pruned(inputs_embeds=x).last_hidden_state.square().mean().backward()
    allocator.before_step()
    optimizer.step()
    allocator.step()
    optimizer.zero_grad()
    ranks = [len(axis) for axis in rank_axes(pruned).values()]
    seconds = common.interleaved(
        {name: growth.step(model, x) for name, model in models.items()}, rounds, warm=2
    )
    floor = growth.kept(models["floor"], x)
    found: dict[str, Any] = {
        "ranks": {"sum": sum(ranks), "of": count, "least": min(ranks), "most": max(ranks)}
    }
    for name in ("rank 64", "half of it"):
        own = [1000 * (a - b) for a, b in zip(seconds[name], seconds["floor"], strict=True)]
        parameters = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        found[name] = {
            "parameters": parameters,
            "kept": growth.kept(models[name], x) - floor,
            "ms": common.quartiles(own),
        }
    return found


def page(found: dict[str, Any]) -> str:
    run, cut = found["memory"], found["half"]
    rows = [
        [
            name,
            f"{run['before'][name]:,}",
            f"{run['after'][name]:,}",
            f"{run['after'][name] / run['before'][name]:.3f}",
        ]
        for name in run["before"]
    ]
    whole, halved = cut["rank 64"], cut["half of it"]
    parts = [
        [what, f"{whole[key]:,}", f"{halved[key]:,}", f"{halved[key] / whole[key]:.3f}"]
        for what, key in (
            ("parameters", "parameters"),
            ("bytes kept for the backward pass", "kept"),
        )
    ]
    times = common.spread(whole["ms"]), common.spread(halved["ms"])
    parts.append(
        ["milliseconds of a step", *times, f"{halved['ms']['median'] / whole['ms']['median']:.3f}"]
    )
    ranks = cut["ranks"]
    text = [
        "# What falling ranks free",
        common.paragraph(
            "This page is written by `python benchmarks/rank_memory.py`, which explains the",
            "measurement.",
        ),
        common.on(found["machine"]),
        "## A run",
        common.paragraph(
            f"LoRA of rank {found['start']} on all {run['layers']} linear layers of SmolLM2-135M",
            "is pruned by AdaLoRA (`soft=False`, a budget in parameters) in one event to what rank",
            f"{found['end']} costs. {run['ranks']} ranks are left. The table shows bytes after a",
            "backward pass before the event, and after it. The resident figure includes the frozen",
            "weights, the libraries and the activations.",
        ),
        common.table(["bytes", "before", "after", "ratio"], rows),
        "## Half of the ranks",
        common.paragraph(
            "LoRA of rank 64 on the 56 linear layers of 8 blocks of SmolLM2's shapes, in bf16,",
            f"with 4 x 128 tokens, has {ranks['of']} ranks. {ranks['sum']} are left after",
            f"AdaLoRA's plan by random scores, from {ranks['least']} to {ranks['most']} in a",
            f"layer. The table shows what each adds to the frozen floor, in {found['rounds']}",
            "interleaved rounds. Not all of the time is proportional to the rank, because each",
            "layer's input and output are read and written all the same.",
        ),
        common.table(["added to the floor", "rank 64", "half of it", "ratio"], parts),
    ]
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=int, default=64)
    parser.add_argument("--end", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {
        "machine": common.machine(),
        "start": args.start,
        "end": args.end,
        "rounds": args.rounds,
    }
    found |= {"memory": memory(args.start, args.end), "half": half(args.rounds)}
    common.write("rank_memory", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
