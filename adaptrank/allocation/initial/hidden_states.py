"""Hidden states between the repeated blocks of a model, one vector for each example."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.parameterizations import named_layers, wrappers

Pooling = Literal["mean", "last", "first"]


class HiddenStates:
    """Vectors at every boundary of the blocks: the inputs of each block, and the last output.

    Args:
        model: holds the blocks.
        place: path of the list of blocks.
        pooling: how the tokens of an example become one vector, as in `pooled`.
    """

    def __init__(self, model: nn.Module, place: str, pooling: Pooling) -> None:
        self.prefix = f"{place}." if place else ""
        self.pooling = pooling
        self.mask: Tensor | None = None
        """Attention mask of the present batch, (B, T)."""
        self.blocks: list[nn.Module] = []
        modules = named_layers(model)
        while (path := f"{self.prefix}{len(self.blocks)}") in modules:
            self.blocks.append(modules[path])
        self.vectors: list[list[Tensor]] = [[] for _ in range(len(self.blocks) + 1)]
        """Boundary -> vectors of each batch, (B, D)."""

    def count(self) -> int:
        """Return the number of examples so far."""
        return sum(map(len, self.vectors[0]))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect the vectors of all forward passes inside."""
        handles = []
        for boundary, block in enumerate(self.blocks):
            enter = partial(self._enter, boundary)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(self.blocks[-1].register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(
        self, boundary: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._collect(boundary, [*args, *kwargs.values()])

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self._collect(len(self.blocks), _values(output))

    def _collect(self, boundary: int, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                vector = pooled(value, self.mask, self.pooling)
                self.vectors[boundary].append(vector.float().cpu())
                return
        raise UserError(
            f"GeLoRA finds no hidden states in what block {self.prefix}{boundary} reads."
        )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Disable all adapters that train."""
    disabled = []
    for wrapper in wrappers(model):
        trains = any(parameter.requires_grad for _, parameter in wrapper.own_parameters())
        if wrapper.enabled and trains:
            disabled.append(wrapper)
    try:
        for wrapper in disabled:
            wrapper.enabled = False
        yield
    finally:
        for wrapper in disabled:
            wrapper.enabled = True


def pooled(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Return one vector for each example: hidden (B, T, D) -> (B, D).

    Args:
        hidden: hidden states. Any other shape is flattened to (B, -1).
        mask: attention mask, (B, T). One of another shape is ignored.
        pooling: "mean" of the tokens that the mask lets through, the "last" or the "first" of them.
    """
    if hidden.dim() != 3:
        return hidden.flatten(1)
    visible = torch.ones(hidden.shape[:2], device=hidden.device)
    if mask is not None and mask.shape == visible.shape:
        visible = (mask != 0).to(visible)
    if pooling == "mean":
        count = visible.sum(1, keepdim=True).clamp(min=1)
        return (hidden.double() * visible[..., None]).sum(1) / count
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    if pooling == "last":
        chosen = (visible * positions).argmax(1)
    else:
        chosen = (visible * (len(positions) - positions)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen]


def attention_mask(batch: Any) -> Tensor | None:
    """Return the attention mask of a batch, if it is a mapping with one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def _values(output: Any) -> list[Any]:
    """Return the values in the output of a block."""
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, (tuple, list)):
        return list(output)
    return [output]
