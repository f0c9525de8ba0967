"""Rows that enter the layers of an axis in a forward pass, without padding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank.allocation.scores.importance import Axes

See = Callable[[str, Tensor, int], None]
"""Function (axis key, rows, identity of the tensor that they were cut from)."""


def watch(model: nn.Module, axes: Axes, see: See, labelled: bool = True) -> list[RemovableHandle]:
    """Call `see(key, rows, tensor)` for every layer of an axis in every forward pass.

    `rows` are the inputs of the layer, (tokens, n). Padding is left out, as the `attention_mask`
    (batch, tokens) of the pass says. `tensor` identifies the tensor that the rows were cut from:
    layers that read the same tensor in one pass get the same number.

    A pass begins when a module is called while no other module of the model is running. It may be
    the model or a part of it. Passes are meant to be without gradients. A checkpointed block that
    is computed once more in the backward pass would be shown again.

    Args:
        model: model that holds the layers. A mask may arrive at any of its modules.
        axes: axes whose layers are watched.
        see: function that takes the rows, which are detached.
        labelled: leave out tokens whose label is -100.
    Returns:
        Handles that remove the hooks.
    """
    watcher = _Watcher(see, labelled)
    handles = []
    for module in model.modules():
        if any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(watcher.begin, with_kwargs=True))
            handles.append(module.register_forward_hook(watcher.end, always_call=True))
    for key, axis in axes.items():
        for layer, _ in axis.members:
            handles.append(layer.register_forward_pre_hook(partial(watcher.enter, key)))
    return handles


class _Watcher:
    """Hooks of `watch`, with the masks of the present pass."""

    def __init__(self, see: See, labelled: bool) -> None:
        self.see = see
        self.labelled = labelled
        self.running = 0
        """Modules that are called and have not returned."""
        self.masks: dict[str, Tensor] = {}
        """Name -> tokens that count, (batch, tokens)."""
        self.decoder_masks: dict[str, Tensor] = {}
        """The same for a decoder that reads an encoder."""
        self.encoded: Tensor | None = None
        """Output of the encoder, once the decoder of the present pass reads it."""
        self.alive: dict[int, Tensor] = {}
        """Inputs of this pass. No other tensor can take the identity of one that is alive."""

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.running == 0:
            self.masks.clear()
            self.decoder_masks.clear()
            self.encoded = None
            self.alive.clear()
        self.running += 1
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        encoded = kwargs.get("encoder_hidden_states")
        masks = self.masks
        if isinstance(encoded, Tensor):
            self.encoded, masks = encoded, self.decoder_masks
        if isinstance(mask, Tensor) and mask.dim() == 2:
            masks["attention_mask"] = mask != 0
        if self.labelled and isinstance(labels, Tensor) and labels.dim() == 2:
            self.masks["labels"] = labels != -100

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running -= 1

    def enter(self, key: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0]
        rows = inputs.detach().flatten(0, -2)
        # Of a decoder that reads an encoder, cross-attention alone has the encoder's tokens.
        is_decoded = self.encoded is not None and inputs is not self.encoded
        known = self.decoder_masks if is_decoded else self.masks
        masks = [mask.flatten() for mask in known.values() if mask.numel() == len(rows)]
        if masks:
            rows = rows[torch.stack(masks).all(0)]
        self.alive[id(inputs)] = inputs
        self.see(key, rows, id(inputs))
