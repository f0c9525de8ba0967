"""Replay of the leading blocks of a model: their outputs are returned again, not computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from adaptrank.allocation.scores.importance import Axes, Run


class Replay:
    """Outputs of the blocks in one clean pass, and how many of them each axis can skip.

    A unit changes nothing before the first block that holds one of its layers. The outputs of all
    earlier blocks are those of the clean pass.

    Args:
        axes: axes whose units are changed.
        run: model and loss.
        blocks: blocks of the model in any order, or none to compute every pass whole.
    """

    def __init__(self, axes: Axes, run: Run, blocks: Sequence[nn.Module]) -> None:
        self._axes = axes
        self._run = run
        self._blocks = blocks
        self._order: list[nn.Module] = []
        self._outputs: dict[nn.Module, Any] = {}
        self._skippable: dict[str, int] = {}

    def record(self, batch: Any) -> None:
        """Make a clean pass of a batch and remember what the blocks return."""
        known_order = self._order
        self._order, self._outputs = [], {}
        handles = [block.register_forward_hook(self._remember) for block in self._blocks]
        try:
            clean_loss = float(self._run.loss(batch))
        finally:
            for handle in handles:
                handle.remove()
        if self._order != known_order:
            # This happens once, unless a batch takes another way through the model.
            self._skippable = self._find_skippable(batch, clean_loss)

    def loss(self, batch: Any, key: str) -> float:
        """Return the loss of the recorded batch, without computing the blocks before an axis."""
        with self._replayed(self._skippable.get(key, 0)):
            return float(self._run.loss(batch))

    def _remember(self, block: nn.Module, args: Any, output: Any) -> None:
        self._order.append(block)
        self._outputs[block] = output

    def _find_skippable(self, batch: Any, clean_loss: float) -> dict[str, int]:
        """Return axis -> number of leading blocks that need not be computed for its units.

        Each prefix is tried without any change of a unit. It is used only if the loss is that of
        the clean pass to the last bit. It is not if a block writes into the output of another one,
        or leaves something behind for a later one beside its output. If a block runs twice, its
        calls cannot be told apart, and no prefix is used.
        """
        if len(self._order) != len(set(self._order)):
            return {}
        first_blocks = self._first_blocks()
        usable = [0]
        for count in sorted(set(first_blocks.values())):
            if count and self._gives_same_loss(batch, count, clean_loss):
                usable.append(count)
        longest = {}
        for key, first in first_blocks.items():
            longest[key] = max(count for count in usable if count <= first)
        return longest

    def _first_blocks(self) -> dict[str, int]:
        """Return axis -> the first block that holds one of its layers, 0 if one is in no block."""
        block_of: dict[int, int] = {}
        for index, block in enumerate(self._order):
            for module in block.modules():
                block_of.setdefault(id(module), index)
        first_blocks = {}
        for key, axis in self._axes.items():
            first_blocks[key] = min(block_of.get(id(layer), 0) for layer, _ in axis.members)
        return first_blocks

    def _gives_same_loss(self, batch: Any, count: int, clean_loss: float) -> bool:
        try:
            with self._replayed(count):
                return float(self._run.loss(batch)) == clean_loss
        except Exception:
            # A later block misses what one of the skipped ones leaves behind.
            return False

    @contextmanager
    def _replayed(self, count: int) -> Iterator[None]:
        """Let the first `count` blocks return their recorded outputs."""
        blocks = self._order[:count]
        # Others, such as accelerate, may have replaced `forward` on the instance already.
        replaced = [block.__dict__.get("forward") for block in blocks]
        try:
            for block in blocks:
                block.forward = partial(_return_recorded, self._outputs[block])
            yield
        finally:
            for block, forward in zip(blocks, replaced, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward


def _return_recorded(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output
