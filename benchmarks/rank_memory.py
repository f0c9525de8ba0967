"""Do ranks really fall? Bytes of adapter parameters, gradients and optimizer state, and resident memory, before and after.

    python benchmarks/rank_memory.py [--backbone HuggingFaceTB/SmolLM2-135M-Instruct] [--start 64] [--end 8]

Trains LoRA at the start rank on all linear layers for a few steps, lets AdaLoRA prune to the end rank in one event, and trains
on. Everything is measured in the one process, between steps, through an ordinary Lightning run.
"""

import argparse
import ctypes
import gc
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from adaptrank.allocators.adalora import AdaLoRA
from adaptrank.axes import cost_model, rank_axes
from adaptrank.data import ArithmeticProblems
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations.lora import LoRA


def resident() -> int:
    """Resident memory of this process in bytes, once freed blocks are given back (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Measure(Callback):
    """Notes sizes after each backward pass, where gradients are at their largest."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        state = [v for p in parameters for v in optimizer.state[p].values() if torch.is_tensor(v)]
        sizes = {
            "parameters": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer state": sum(v.nbytes for v in state),
            "resident": resident(),
        }
        self.rows.append(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--start", type=int, default=64)
    parser.add_argument("--end", type=int, default=8)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    torch.manual_seed(0)
    module = CausalLM(args.backbone, [Adapter([partial(LoRA, rank=args.start)])], generate=False)
    module.configure_model()
    budget = cost_model(module).total(dict.fromkeys(rank_axes(module), args.end))
    measure = Measure()
    trainer = Trainer(
        max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[AdaLoRA(budget, soft=False, importance="magnitude", unit="parameters", every=1, warmup=2, final=3), measure],
    )  # fmt: skip
    trainer.fit(module, datamodule=ArithmeticProblems(batch_size=2, train_size=40, val_size=4))

    before, after = measure.rows[2], measure.rows[-1]
    ranks = sum(len(axis) for axis in rank_axes(module).values())
    print(
        f"{len(rank_axes(module))} layers of rank {args.start}, pruned to the parameters of rank {args.end}: {ranks} ranks left"
    )
    print(f"{'bytes':18}{'before':>14}{'after':>14}{'ratio':>8}")
    for name in before:
        print(f"{name:18}{before[name]:>14,}{after[name]:>14,}{after[name] / before[name]:>8.3f}")


if __name__ == "__main__":
    main()
