"""Running averages of the sizes of inputs, for the input-side factors of rank axes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank.allocation.context import Axes
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import RankAxis, Slot, natural


class Factor(NamedTuple):
    """An input-side factor of an axis.

    Args:
        axis: axis of the factor.
        slot: place of the factor in the axis.
    """

    axis: RankAxis
    slot: Slot

    @property
    def name(self) -> tuple[str, str]:
        """Axis key and label of the slot."""
        return self.axis.key, self.slot.label


class InputSums(NamedTuple):
    """Sum of the squares of each input, (n,), and number of tokens, ()."""

    squares: Tensor
    tokens: Tensor


class InputAverages(TrackedTensors):
    """Running averages e_j <- beta e_j + (1 - beta) sqrt(mean x_j^2) of each input j.

    The mean is over the tokens of an optimizer step, except those that an attention mask leaves
    out. The sums of the present step are no part of a checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        """Attention mask of the present forward pass, (B, T)."""
        self.sums: dict[tuple[str, str], InputSums] = {}
        """Factor -> sums of the present optimizer step."""

    def average(self, factor: Factor) -> Tensor:
        """Return e of the inputs of a factor, (n,)."""
        slot = factor.slot
        zeros = torch.zeros(slot.layer.shape[1], device=slot.tensor.device)
        return self.track(factor.axis, slot.label, zeros, where=None)

    def watch(self, model: nn.Module, axes: Axes) -> list[RemovableHandle]:
        """Sum up the inputs of every training pass. Return the handles of the hooks."""
        handles = []
        for factor in input_factors(axes):
            for layer, name in factor.axis.members:
                if getattr(layer, layer.input_factor[name]) is factor.slot.tensor:
                    see = partial(self._see_inputs, factor.name)
                    handles.append(layer.register_forward_pre_hook(see))
        for module in model.modules():
            if any(True for _ in module.children()):
                hook = module.register_forward_pre_hook(self._see_mask, with_kwargs=True)
                handles.append(hook)
        return handles

    def update(
        self, factors: Sequence[Factor], beta: float, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        """Feed the averages with the sums of this step from all processes, by one exchange.

        Args:
            factors: factors to update.
            beta: decay of the averages.
            reduce: mean of a tensor over all processes.
        """
        averages = [self.average(factor) for factor in factors]
        parts = []
        for factor, average in zip(factors, averages, strict=True):
            nothing = InputSums(torch.zeros_like(average), average.new_zeros(()))
            sums = self.sums.get(factor.name, nothing)
            parts += [sums.squares, sums.tokens[None]]
        lengths = [len(part) for part in parts]
        device = parts[0].device
        flat = reduce(torch.cat([part.to(device) for part in parts]))
        totals = torch.split(flat, lengths)
        for average, squares, tokens in zip(averages, totals[::2], totals[1::2], strict=True):
            root = (squares / tokens).sqrt().to(average.device)
            averaged = average.mul(beta).add(root, alpha=1 - beta)
            # It is not finite if a layer took no part, or read values that are not finite.
            average.copy_(torch.where(root.isfinite().all(), averaged, average))
        self.sums = {}

    def _see_mask(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if module.training and isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask = mask

    @torch.no_grad()
    def _see_inputs(self, factor: tuple[str, str], layer: nn.Module, args: tuple[Any, ...]) -> None:
        # With gradient checkpointing the same inputs come twice, which does not change a mean.
        if not layer.training or not args:
            return
        squares = args[0].detach().float().square().flatten(0, -2)  # (tokens, n)
        if self.mask is not None and self.mask.numel() == len(squares):
            visible = (self.mask != 0).flatten().to(squares)
            sums = InputSums(visible @ squares, visible.sum())
        else:
            sums = InputSums(squares.sum(0), squares.new_full((), len(squares)))
        earlier = self.sums.get(factor)
        if earlier is not None:
            sums = InputSums(earlier.squares + sums.squares, earlier.tokens + sums.tokens)
        self.sums[factor] = sums


def input_factors(axes: Axes) -> list[Factor]:
    """Return the input-side factors of all axes, a tied one once for its axis."""
    factors = []
    for axis in axes.values():
        named = set()
        for layer, name in axis.members:
            if name in layer.input_factor:
                named.add((id(layer), layer.input_factor[name]))
        slots = [slot for slot in axis.slots() if (id(slot.layer), slot.name) in named]
        slots.sort(key=lambda slot: natural(slot.label))
        factors += [Factor(axis, slot) for slot in slots]
    return factors
