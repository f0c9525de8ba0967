"""PRILoRA: ranks that rise from block to block, and temporary zeros in A where it matters least."""

import logging
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.events import Event
from adaptrank.allocation.initial.blocks import cut, find_blocks
from adaptrank.allocation.plans import apportion, in_steps
from adaptrank.allocation.scores.gradient import Axes
from adaptrank.axes import CostModel, RankAxis, Slot, natural

log = logging.getLogger("adaptrank")


class PRILoRA(Allocator):
    """Start from ranks r_l = first + (last - first) (l - 1) / (L - 1) in block l of L, and zero the least important part of A.

    All layers of a block get the same rank, rounded by largest remainder, so that the mean over the blocks that have an adapter is
    (first + last) / 2: a mean of ranks, not of parameters, where widths differ. With unit="parameters" the ranks rise in the same
    proportions, and all adapters together cost no more than with that mean everywhere. Layers outside of the repeated blocks keep their
    rank. Of units that are spread over parts of a layer, each part gets r_l.

    Every `every` steps the `sparsity` lowest of each row of the input-side factor A are set to zero, by |A_ij| e_j, ties by column. They
    stay trainable, moments stay, and they may return. e_j <- beta e_j + (1 - beta) sqrt(mean x_j^2) is a running average of input j over
    the tokens of a step, those that an attention mask leaves out excepted, before dropout. The mean over tokens, where the paper has a norm
    over the batch, makes batches of unequal length count alike. Nothing is zeroed in the last `final` steps: what is saved is then what was
    evaluated. `sparsity=0` leaves the ranks alone.

    The ranks do not move afterwards, and another allocator may move them.

    Source: arXiv:2401.11316 (abstract and partial summaries; the interval of 40, the half of each row, 4 and 12, and the kind of statistics
    are recalled, unverified; beta is unknown, 0.9 is ours, and so are the rounding and the moments).
    Args:
        first: rank in the first block.
        last: rank in the last block.
        sparsity: fraction of each row of A that is set to zero, from 0 to below 1, rounded up to whole entries.
        every: optimizer steps from one pruning of A to the next.
        beta: of the running average of inputs.
        final: steps at the end in which nothing is zeroed, an integer, or a fraction of all.
        unit, cap, seed: as in `Allocator`.
    Raises:
        ValueError: for arguments out of range; at the start of a run, if the layers are in no numbered blocks, A would never be pruned, or
            a layer reads something else than vectors.
    """

    source = "arXiv:2401.11316"
    requires = frozenset({"pattern"})
    options = {"sparsity": frozenset({"input_factor"})}
    moves = False

    def __init__(
        self,
        first: int = 4,
        last: int = 12,
        sparsity: float = 0.5,
        every: int = 40,
        beta: float = 0.9,
        final: int | float = 0.1,
        unit: Literal["ranks", "parameters"] = "ranks",
        cap: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(None, unit, every, 0, final, 1, cap, seed)
        if first < 1 or last < 1:
            raise UserError(
                f"first={first}, last={last}: ranks are at least 1; the paper's are 4 and 12."
            )
        if not 0 <= sparsity < 1 or not 0 <= beta < 1:
            raise UserError(
                f"sparsity={sparsity}, beta={beta}: both are fractions from 0 to below 1; use 0.5 and 0.9."
            )
        self.first, self.last, self.sparsity, self.beta = first, last, sparsity, beta
        self._seen: dict[
            tuple[str, str], tuple[Tensor, Tensor]
        ] = {}  # sums of squares, and tokens, of this step
        self._mask: Tensor | None = None

    # ---- the ranks to start from

    def initial_ranks(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, int]:
        place, numbers = find_blocks(model, self.run.axes)
        outside = {key: size for key, size in self.sizes().items() if not numbers[key]}
        if outside:
            log.warning(
                "PRILoRA: %d axes lie outside of the blocks in %r and keep their rank: %s%s.",
                len(outside), place, ", ".join([*outside][:3]), ", ..." if len(outside) > 3 else "",
            )  # fmt: skip
        # Layers that share a tensor lie in several blocks: they are a block of their own, in the middle.
        block_of = {key: "+".join(map(str, found)) for key, found in numbers.items() if found}
        wanted = rising(numbers, self.first, self.last)
        weights = {
            block: sum(wanted[int(i)] for i in block.split("+")) / (block.count("+") + 1)
            for block in block_of.values()
        }
        steps = {key: axis.step for key, axis in self.run.axes.items()}
        if self.unit == "ranks":
            cost = CostModel(0, tuple((1, (block,)) for block in weights))
            budget = math.floor(sum(weights.values()) + 0.5)
        else:
            axes = in_steps(self.cost(), steps, outside)
            cost = CostModel(
                axes.fixed,
                tuple((price, tuple(block_of[a] for a in own)) for price, own in axes.terms),
            )
            budget = math.floor(
                cost.total(dict.fromkeys(weights, (self.first + self.last) / 2)) + 1e-9
            )
        ranks = apportion(weights, cost, budget)
        return cut(
            "PRILoRA",
            {key: ranks[block] * steps[key] for key, block in block_of.items()},
            self.caps(),
            steps,
        )

    def begin(self, sizes: Mapping[str, int]) -> None:
        if self.sparsity and self.every > self.phases.end:
            raise UserError(
                f"PRILoRA would never prune A: every {self.every} steps, and {self.phases.end} of {self.phases.total} steps before "
                f"the final phase; lower `every`, or set sparsity=0 for the ranks alone."
            )

    # ---- zeros in A

    def attach(self, axes: Axes) -> None:
        self._seen, self._mask = {}, None
        if not self.sparsity:
            return
        for key, axis in axes.items():
            for layer, _ in axis.members:
                if isinstance(layer.innermost, (nn.Embedding, nn.Conv2d)):
                    raise UserError(
                        f"PRILoRA prunes A by the vectors that a layer reads, and {key} is {type(layer.innermost).__name__}; leave "
                        f"it out, or set sparsity=0 for the ranks alone."
                    )
        for key, axis in axes.items():
            for slot in input_factors(axis):
                for layer, name in axis.members:
                    if getattr(layer, layer.input_factor[name]) is slot.tensor:
                        self.handles.append(
                            layer.register_forward_pre_hook(partial(self._see, (key, slot.label)))
                        )
        for module in self.model.modules():
            if any(True for _ in module.children()):
                self.handles.append(
                    module.register_forward_pre_hook(self._see_mask, with_kwargs=True)
                )

    def _see_mask(
        self, module: nn.Module, values: tuple[Any, ...], named: Mapping[str, Any]
    ) -> None:
        mask = named.get("attention_mask")
        if module.training and isinstance(mask, Tensor) and mask.dim() == 2:
            self._mask = mask

    @torch.no_grad()
    def _see(self, factor: tuple[str, str], layer: nn.Module, values: tuple[Any, ...]) -> None:
        # Gradient checkpointing comes by twice, which a mean does not mind.
        if not layer.training or not values:
            return
        squares = values[0].detach().float().square().flatten(0, -2)  # (tokens, n)
        mask = self._mask
        if mask is not None and mask.numel() == len(squares):
            seen = (mask != 0).flatten().to(squares)
            total, tokens = seen @ squares, seen.sum()
        else:
            total, tokens = squares.sum(0), squares.new_tensor(float(len(squares)))
        before = self._seen.get(factor)
        self._seen[factor] = (
            (total, tokens) if before is None else (before[0] + total, before[1] + tokens)
        )

    def before_forward(self, axes: Axes) -> None:
        self._mask = None

    def after_step(self, axes: Axes) -> None:
        if not self.sparsity or self.steps_done > self.phases.end:
            return
        factors = [(axis, slot) for axis in axes.values() for slot in input_factors(axis)]
        self._average(factors)
        if self.steps_done % self.every == 0:
            for axis, slot in factors:
                name = next(name for layer, name in axis.members if layer is slot.layer)
                inputs = slot.layer.of_inputs(name, self._of(axis, slot))
                slot.tensor.data.masked_fill_(
                    lowest(slot.tensor.data.abs() * inputs, self.sparsity), 0
                )
            reason = f"the least important {self.sparsity:.0%} of each row set to zero"
            moved: Event = {
                "sizes": {},
                "pruned": {},
                "grown": {},
                "closed": {},
            }  # nothing: entries are no units
            self.run.record(
                {
                    "step": self.steps_done,
                    "reason": reason,
                    "budget": None,
                    "unit": self.unit,
                    **moved,
                }
            )

    def _of(self, axis: RankAxis, slot: Slot) -> Tensor:
        device = slot.tensor.device
        return self.track(
            axis, slot.label, torch.zeros(slot.layer.shape[1], device=device), where=None
        )

    def _average(self, factors: list[tuple[RankAxis, Slot]]) -> None:
        """Feed the running averages with what all processes saw in this step, by one exchange."""
        averages = [self._of(axis, slot) for axis, slot in factors]
        parts = []
        for (axis, slot), average in zip(factors, averages, strict=True):
            total, tokens = self._seen.get(
                (axis.key, slot.label), (torch.zeros_like(average), average.new_zeros(()))
            )
            parts += [total, tokens[None]]
        sizes, device = [len(part) for part in parts], parts[0].device
        totals = torch.split(self.reduce(torch.cat([part.to(device) for part in parts])), sizes)
        for average, squares, tokens in zip(averages, totals[::2], totals[1::2], strict=True):
            root = (squares / tokens).sqrt().to(average.device)
            if bool(
                root.isfinite().all()
            ):  # it is not where a layer took no part, or read what is no number
                average.mul_(self.beta).add_(root, alpha=1 - self.beta)
        self._seen = {}


def rising(numbers: Mapping[str, Iterable[int]], first: int, last: int) -> dict[int, float]:
    """Block -> the rank on the line from the first of these blocks to the last; a single one has the mean."""
    blocks = sorted({block for found in numbers.values() for block in found})
    if len(blocks) == 1:
        return {blocks[0]: (first + last) / 2}
    return {block: first + (last - first) * i / (len(blocks) - 1) for i, block in enumerate(blocks)}


def input_factors(axis: RankAxis) -> list[Slot]:
    """The input-side factors of an axis, a tied one once."""
    named = {
        (id(layer), layer.input_factor[name])
        for layer, name in axis.members
        if name in layer.input_factor
    }
    return sorted(
        (s for s in axis.slots() if (id(s.layer), s.name) in named),
        key=lambda slot: natural(slot.label),
    )


def lowest(importance: Tensor, fraction: float) -> Tensor:
    """Where the lowest entries of each row are: fraction of its length, rounded up, but never all; ties by column."""
    width = importance.shape[1]
    count = min(width - 1, math.ceil(round(fraction * width, 9)))
    columns = importance.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, columns, True)
