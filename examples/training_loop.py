"""Train with moving ranks in a plain PyTorch loop.

An allocator needs three calls: `start` before the first step, `before_step` when the gradients are
complete, and `step` after the optimizer's step.
"""

from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import nn

from adaptrank import adapt, load_adapter, rank_axes, save_adapter
from adaptrank.allocation import AdaLoRA
from adaptrank.parameterizations import LoRA

STEPS = 60


def base_model() -> nn.Module:
    """Return the "pretrained" model, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)
    )


def main() -> None:
    model = base_model()
    adapt(model, "all-linear", partial(LoRA, rank=4))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)

    # Three layers of rank 4 have 12 units. The allocator keeps the 6 most important ones.
    allocator = AdaLoRA(budget=6, every=5, warmup=20, final=20)
    allocator.start(model, optimizer, total_steps=STEPS)

    for step in range(STEPS):
        x = torch.randn(32, 16)
        loss = (model(x) - x[:, :4].sin()).square().mean()
        loss.backward()
        allocator.before_step()
        optimizer.step()
        event = allocator.step()
        optimizer.zero_grad()
        if event is not None:
            print(f"step {step + 1}: loss {loss.item():.3f}, {event['reason']}")
    allocator.finish()

    # The file holds the ranks that the run has found.
    folder = save_adapter(model, Path(mkdtemp()) / "adapter")
    loaded = load_adapter(base_model(), folder)
    for key, axis in rank_axes(loaded).items():
        print(f"{key} has {len(axis)} units")
    x = torch.randn(8, 16)
    torch.testing.assert_close(loaded(x), model(x))


if __name__ == "__main__":
    main()
