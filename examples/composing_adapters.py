"""Train two adapters one by one, and put them on their base as one.

The sum of two LoRAs is a LoRA, exactly. Other operators, such as TIES, drop small changes and
settle conflicts of signs.
"""

from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

from adaptrank import adapt, compose, save_adapter
from adaptrank.composition import Compression
from adaptrank.parameterizations import LoRA


def base_model() -> nn.Module:
    """Return the "pretrained" model, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 2))


def inputs() -> Tensor:
    """Return the inputs of both tasks."""
    return torch.randn(256, 16, generator=torch.Generator().manual_seed(1))


def target(x: Tensor, output: int) -> Tensor:
    """Return what a task wants of its output: one learns a sum, the other a difference."""
    return x[:, 0] + x[:, 1] if output == 0 else x[:, 2] - x[:, 3]


def loss(model: nn.Module, output: int) -> Tensor:
    """Return the mean squared error of one task."""
    x = inputs()
    return (model(x)[:, output] - target(x, output)).square().mean()


def train(output: int, folder: Path) -> Path:
    """Train an adapter for one task, and return the folder it was saved to."""
    model = adapt(base_model(), "all-linear", partial(LoRA, rank=4))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model, output).backward()
        optimizer.step()
    save_adapter(model, folder)
    return folder


def main() -> None:
    folder = Path(mkdtemp())
    adapters = [train(0, folder / "sums"), train(1, folder / "differences")]
    print(f"base:  {loss(base_model(), 0):.3f} and {loss(base_model(), 1):.3f}")

    for operator, options in {"sum": {}, "ties": {"density": 0.5}}.items():
        model = base_model()
        report = compose(
            model, adapters, operator=operator, compression=Compression(rank=8), **options
        )
        ranks = [layer["rank"] for layer in report["layers"].values()]
        losses = f"{loss(model, 0):.3f} and {loss(model, 1):.3f}"
        print(f"{operator}: losses {losses}, ranks {ranks}")


if __name__ == "__main__":
    main()
