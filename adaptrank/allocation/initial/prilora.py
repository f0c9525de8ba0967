"""PRILoRA: ranks that rise from block to block, and temporary zeros in A where it matters least."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.allocation.context import Axes
from adaptrank.allocation.events import Event
from adaptrank.allocation.initial.blocks import cut, find_blocks, warn_outside
from adaptrank.allocation.initial.initializer import Choice, RankInitializer
from adaptrank.allocation.initial.input_averages import Factor, InputAverages, input_factors
from adaptrank.allocation.plans import apportion
from adaptrank.axes import CostModel


class PRILoRA(RankInitializer):
    """Give block l of L the rank first + (last - first) (l - 1) / (L - 1), and zero parts of A.

    All layers of a block get the same rank, rounded by largest remainder, so that the mean over
    the blocks with an adapter is (first + last) / 2. It is a mean of ranks. With
    unit="parameters" the ranks rise in the same proportions, and all adapters together cost no
    more than with that mean everywhere. Layers outside of the repeated blocks keep their rank. If
    units are spread over parts of a layer, each part gets the rank.

    Every `every` steps the `sparsity` lowest entries of each row of the input-side factor A are
    set to zero, by |A_ij| e_j, ties by column. They stay trainable, their moments stay, and they
    may return. e_j <- beta e_j + (1 - beta) sqrt(mean x_j^2) is a running average of input j over
    the tokens of a step, before dropout, without tokens that an attention mask leaves out. The
    paper has a norm over the batch. The mean over tokens makes batches of unequal length count
    alike. Nothing is zeroed in the last `final` steps, so that the saved adapter is the evaluated
    one. `sparsity=0` leaves A alone.

    The ranks do not move afterwards, and another allocator may move them.

    Source: arXiv:2401.11316 (abstract and partial summaries). The interval of 40, half of each
    row, 4 and 12, and the kind of statistics are recalled and unverified. beta is unknown, and 0.9
    is ours, as are the rounding and the handling of moments.

    Args:
        first: rank in the first block.
        last: rank in the last block.
        sparsity: fraction of each row of A that is set to zero, from 0 to below 1, rounded up to
            whole entries.
        every: optimizer steps from one pruning of A to the next.
        beta: decay of the running average of inputs.
        final: steps at the end in which nothing is zeroed, an integer, or a fraction of all steps.
        unit, cap, seed: as in `RankInitializer`.
    Raises:
        UserError: for arguments out of range. At the start of a run: if the layers are in no
            numbered blocks, A would never be pruned, or the inputs of a layer are not vectors.
    """

    source = "arXiv:2401.11316"
    requires = frozenset({"pattern"})
    options = {"sparsity": frozenset({"input_factor"})}

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
        super().__init__(None, unit, cap=cap, seed=seed, every=every, final=final)
        if first < 1 or last < 1:
            raise UserError(
                f"first={first}, last={last}: ranks are at least 1. The paper's are 4 and 12."
            )
        if not 0 <= sparsity < 1 or not 0 <= beta < 1:
            raise UserError(
                f"sparsity={sparsity}, beta={beta}: both are fractions from 0 to below 1. Use 0.5 "
                f"and 0.9."
            )
        self.first, self.last, self.sparsity, self.beta = first, last, sparsity, beta

    # ---- the ranks to start from

    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice:
        place, numbers = find_blocks(self.run.model, axes)
        outside = {key: len(axis) for key, axis in axes.items() if not numbers[key]}
        warn_outside("PRILoRA", place, list(outside))
        block_of = named_blocks(numbers)
        weights = self._weights(numbers)
        steps = {key: axis.step for key, axis in axes.items()}
        if self.unit == "ranks":
            cost = CostModel(0, tuple((1, (block,)) for block in weights))
            budget = math.floor(sum(weights.values()) + 0.5)
        else:
            cost = _cost_of_blocks(self.run.cost().in_steps(steps, outside), block_of)
            mean = (self.first + self.last) / 2
            budget = math.floor(cost.total(dict.fromkeys(weights, mean)) + 1e-9)
        ranks = apportion(weights, cost, budget)
        sizes = {key: ranks[block] * steps[key] for key, block in block_of.items()}
        return Choice(cut("PRILoRA", sizes, self.caps(), steps))

    def _weights(self, numbers: Mapping[str, list[int]]) -> dict[str, float]:
        """Return block name -> its rank on the line, the mean for axes that lie in several."""
        rank_of = rising(numbers, self.first, self.last)
        weights = {}
        for block_numbers in numbers.values():
            if block_numbers:
                total = sum(rank_of[number] for number in block_numbers)
                weights[block_name(block_numbers)] = total / len(block_numbers)
        return weights

    # ---- zeros in A

    def check_start(self, sizes: Mapping[str, int]) -> None:
        """Refuse a run in which A would never be pruned."""
        phases = self.run.phases
        if self.sparsity and self.every > phases.end:
            raise UserError(
                f"PRILoRA would never prune A: every {self.every} steps, and {phases.end} of "
                f"{phases.total} steps before the final phase. Lower `every`, or set sparsity=0 "
                f"for the ranks alone."
            )

    def init_state(self, axes: Axes) -> InputAverages:
        return InputAverages()

    def install(self, state: InputAverages, axes: Axes) -> None:
        if not self.sparsity:
            return
        for key, axis in axes.items():
            for layer, _ in axis.members:
                if isinstance(layer.innermost, (nn.Embedding, nn.Conv2d)):
                    raise UserError(
                        f"PRILoRA prunes A by the vectors that a layer reads, and {key} is "
                        f"{type(layer.innermost).__name__}. Leave it out, or set sparsity=0 for "
                        f"the ranks alone."
                    )
        self.run.handles += state.watch(self.run.model, axes)

    def before_pass(self, state: InputAverages, axes: Axes) -> None:
        state.mask = None

    def finish_step(self, state: InputAverages, axes: Axes) -> None:
        """Update the averages of the inputs, and zero the lowest entries every so many steps."""
        step = self.run.steps_done
        if not self.sparsity or step > self.run.phases.end:
            return
        factors = input_factors(axes)
        state.update(factors, self.beta, self.run.reduce)
        if step % self.every == 0:
            for factor in factors:
                self._zero_lowest(factor, state.average(factor))
            self._record(step)

    def _zero_lowest(self, factor: Factor, average: Tensor) -> None:
        """Zero the lowest entries of each row of A, by |A_ij| e_j."""
        layer, A = factor.slot.layer, factor.slot.tensor
        axis_name = next(name for member, name in factor.axis.members if member is layer)
        e = layer.of_inputs(axis_name, average)  # (n,) or (units, width)
        A.data.masked_fill_(lowest(A.data.abs() * e, self.sparsity), 0)

    def _record(self, step: int) -> None:
        event: Event = {
            "step": step,
            "reason": f"the least important {self.sparsity:.0%} of each row set to zero",
            "budget": None,
            "unit": self.unit,
            # No unit moves: entries of A are no units.
            "sizes": {},
            "pruned": {},
            "grown": {},
            "closed": {},
        }
        self.run.record(event)


def block_name(numbers: Iterable[int]) -> str:
    """Return the name of the block of an axis: "3", or "3+7" for layers that share a tensor."""
    return "+".join(map(str, numbers))


def named_blocks(numbers: Mapping[str, list[int]]) -> dict[str, str]:
    """Return axis -> name of its block, for the axes that lie in one.

    Layers that share a tensor lie in several blocks. They are a block of their own.
    """
    return {
        key: block_name(block_numbers) for key, block_numbers in numbers.items() if block_numbers
    }


def rising(numbers: Mapping[str, Iterable[int]], first: int, last: int) -> dict[int, float]:
    """Return block -> rank on the line from the first to the last block of all axes.

    A single block has the mean.
    """
    blocks = sorted(set().union(*numbers.values()))
    if len(blocks) == 1:
        return {blocks[0]: (first + last) / 2}
    return {block: first + (last - first) * i / (len(blocks) - 1) for i, block in enumerate(blocks)}


def lowest(importance: Tensor, fraction: float) -> Tensor:
    """Return a mask of the lowest entries of each row, ties by column.

    Their number is the fraction of the row's length, rounded up, but never all.
    """
    width = importance.shape[1]
    count = min(width - 1, math.ceil(round(fraction * width, 9)))
    columns = importance.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, columns, True)


def _cost_of_blocks(cost: CostModel, block_of: Mapping[str, str]) -> CostModel:
    """Return the same costs for sizes of blocks: all axes of a block have one size."""
    terms = []
    for price, axes in cost.terms:
        terms.append((price, tuple(block_of[axis] for axis in axes)))
    return CostModel(cost.fixed, tuple(terms))
