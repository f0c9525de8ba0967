"""Write an allocator: the Fisher information of a gate on each unit says what stays.

A unit is multiplied by a gate g = 1. The diagonal of the empirical Fisher information of g is the
mean of (dL/dg)^2 over the training steps. Units with a large value change the loss most.
"""

from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adaptrank import Allocator, adapt, rank_axes
from adaptrank.axes import RankAxis
from adaptrank.parameterizations import LoRA


class GateFisher(Allocator):
    """Keep the units with the largest running mean of (dL/dg)^2, with g a gate on the unit."""

    def observe(self, axes: dict[str, RankAxis]) -> None:
        for axis in axes.values():
            squared = axis.gate_grad().square()
            # The tracked tensor follows every change of ranks, and is part of the checkpoint.
            self.track(axis, "fisher", torch.zeros_like(squared)).lerp_(squared, 0.1)

    def score(self, axis: RankAxis) -> Tensor:
        return self.track(axis, "fisher", torch.zeros(len(axis)))


class Task(LightningModule):
    """A small network that learns to reproduce half of its input."""

    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.network = adapt(network, "all-linear", partial(LoRA, rank=6))

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        wanted = torch.cat([x[:, :8], torch.zeros_like(x[:, 8:])], dim=1)
        return (self.network(x) - wanted).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=1e-2)


def main() -> None:
    torch.manual_seed(0)
    task = Task()
    # The base class has the budget, the schedule, and everything that moves tensors.
    allocator = GateFisher(budget=7, every=10, warmup=20, final=20)
    trainer = Trainer(
        max_steps=80,
        callbacks=[allocator],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(torch.randn(640, 16), batch_size=8))
    for event in allocator.events:
        print(f"step {event['step']}: {event['reason']}")
    for key, axis in rank_axes(task.network).items():
        print(f"{key} has {len(axis)} units")


if __name__ == "__main__":
    main()
