"""Batches and loss of a `transformers.Trainer`, for allocators that look at data."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.allocation.context import Loss


class TrainerBatches:
    """Batches of the Trainer on its device, from the beginning.

    Reading them moves neither the loader that training reads nor PyTorch's random number generator.

    Args:
        loader: the Trainer's loader, or accelerate's wrapper of it.
        device: where batches go.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self._loader, self._device = getattr(loader, "base_dataloader", loader), device

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):  # a shuffling sampler draws its seed
            batches = iter(self._loader)
        while True:
            with torch.random.fork_rng(devices=[]):
                batch = next(batches, None)
            if batch is None:
                return
            yield self._moved(batch)

    def _moved(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):  # GRPO's batches are lists of prompts
            return batch
        return {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }


def loss_of(model: nn.Module, owner: str) -> Loss:
    """Return the function batch -> mean loss that the model computes by itself.

    Args:
        model: the Trainer's model.
        owner: name of the allocator, for errors.
    """

    def loss(batch: Any) -> Tensor:
        _check_batch(batch, owner)
        value: Tensor = model(**batch)["loss"]
        return value

    return loss


def _check_batch(batch: Any, owner: str) -> None:
    """Refuse batches without labels, from which the model alone computes no loss."""
    names = sorted(batch) if isinstance(batch, Mapping) else []
    if any("label" in name or name == "start_positions" for name in names):
        return
    there = ", ".join(names) or f"a {type(batch).__name__}"
    raise UserError(
        f"{owner} evaluates the model's own loss on training batches, and those of this Trainer "
        f"({there}) have no labels; give it to a Trainer or SFTTrainer on the same texts, and "
        f"train the adapter that it leaves."
    )
