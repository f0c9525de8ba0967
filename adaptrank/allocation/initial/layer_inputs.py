"""What flows into the layers of an axis while a model computes: rows of inputs, padding left out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank.allocation.scores.importance import Axes

See = Callable[[str, Tensor, int], None]


def watch(model: nn.Module, axes: Axes, see: See, labelled: bool = True) -> list[RemovableHandle]:
    """Call `see(key, rows, tensor)` for every layer of an axis at every forward pass, with the rows (tokens, n) that enter it.

    `tensor` identifies what they were cut from: layers that read the same tensor in one pass get the same number. Left out are tokens
    that the `attention_mask` (batch, tokens) of the pass says are padding and, unless `labelled` is off, those whose label is -100.

    A pass begins where a module is called while no other of the model is running, be it the model or a part of it. Passes are meant to be without
    gradients: a checkpointed block that is computed once more in the backward pass would be shown again.

    Args:
        model: everything that the pass goes through; a mask may arrive at any of its modules.
        axes: whose layers.
        see: takes the rows; they are detached.
        labelled: leave out what is not predicted.
    Returns:
        Handles to remove the hooks by.
    """
    running: list[nn.Module] = []  # outermost first
    keep: dict[str, Tensor] = {}
    alive: dict[
        int, Tensor
    ] = {}  # of this pass: as long as a tensor lives here, no other has its identity

    def begin(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        mask, labels = named.get("attention_mask"), named.get("labels")
        if not running:
            keep.clear()
            alive.clear()
        running.append(module)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            keep["mask"] = mask != 0
        if labelled and isinstance(labels, Tensor) and labels.dim() == 2:
            keep["labels"] = labels != -100

    def end(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    def enter(key: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().flatten(0, -2)
        masks = [which.flatten() for which in keep.values() if which.numel() == len(rows)]
        if masks:
            rows = rows[torch.stack(masks).all(0)]
        alive[id(args[0])] = args[0]
        see(key, rows, id(args[0]))

    handles = []
    for module in model.modules():
        if any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end, always_call=True))
    for key, axis in axes.items():
        handles += [
            layer.register_forward_pre_hook(partial(enter, key)) for layer, _ in axis.members
        ]
    return handles
