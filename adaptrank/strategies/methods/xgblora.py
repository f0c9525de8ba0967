"""XGBLoRA: boosting with many weak adapters, each on a random subset of the blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptrank._errors import UserError
from adaptrank._options import COUNT, NOT_NEGATIVE, Range
from adaptrank.allocation import Participant
from adaptrank.axes import RankAxis, generator, rank_axes
from adaptrank.parameterizations import Parameterization, built_again, wrapped_layers
from adaptrank.strategies.block_groups import group_by_block
from adaptrank.strategies.first_round import merge_present_changes
from adaptrank.strategies.ledger import live_wrappers, merge_into_ledger
from adaptrank.strategies.merge_and_restart import MergeAndRestart
from adaptrank.strategies.restart import restart, trained_tensors
from adaptrank.strategies.rounds import Rounds

LONG_ROUND = 200
"""Rounds with more optimizer steps have a warm-up of their own by default."""


class XGBLoRA(MergeAndRestart):
    """W_t = W_{t-1} + shrinkage * s B_t A_t: boosts a model with weak adapters, round by round.

    A round has `every` optimizer steps (kappa in the paper). It draws `blocks` of the model's
    transformer blocks (L_s), uniformly and without replacement. The adapted layers of these blocks
    get a booster, which is a fresh adapter of the rank that the adapter's arguments give. All other
    layers have no units, train nothing and cost nothing. The loss is that of the model so far with
    its boosters, so the residual of boosting is implicit. At the border the boosters are merged,
    their optimizer state is deleted, and the next blocks are drawn from (seed, round).

    The paper's boosters have rank 1: give the adapter `rank: 1`. The rank of the whole change of a
    layer is then at most the number of rounds in which its block was drawn. An adapted layer
    outside of all blocks counts as a block of its own.

    Two sizes belong to a run. The events of the rounds have both: `trained`, the numbers that the
    round trains, and `stored`, the numbers in the ledger of merged boosters, which grows.

    With `shrinkage` below 1 a merge changes the function of the model. In a run of Lightning the
    event of such a border has the loss of the last training batch before and after the merge, as
    `loss_before` and `loss_after`. The boosters of the last round are not merged, and count in
    full.

    The paper's objective is reported to have a penalty lambda (||A||^2 + ||B||^2), and its text to
    have none. The default here is none. `weight_decay: 2 lambda` of torch.optim.Adam or SGD adds
    exactly its gradient.

    Rank-changing allocators are refused, because the strategy itself gives units to layers. The
    variant that chooses layers by importance is left out, and so is the one with rounds of adaptive
    length.

    Source: arXiv:2410.19694. Read were the abstract and public reviews. Unverified are the values
        of kappa and alpha_t (reported as constantly 1) and the tables. Reported are 11 of 32 blocks
        as the best L_s for LLaMA3-8B on MMLU, and little gain in time (0.62 s a step against 0.64 s
        of LoRA). The defaults are decisions of this library.
    Args:
        every: optimizer steps of a round. The last round may be shorter.
        blocks: number of blocks that get boosters in a round. None is a third, rounded up.
        shrinkage: factor of a booster when it is merged, in (0, 1].
        restart_warmup: steps in which the learning rate rises to the user's schedule at the start
            of each round but the first. None is a tenth of a round, 50 at most, for rounds of more
            than 200 steps, and 0 for shorter ones.
        seed: seed of the drawn blocks and of the fresh tensors.
    Raises:
        UserError: if a method would train without units, if tensors are shared between layers, if
            there are fewer blocks than `blocks`, if the sizes are not those of the arguments, or if
            the warm-up is longer than a round.
    """

    source = "arXiv:2410.19694"
    ranges = {
        "every": COUNT,
        "blocks": COUNT,
        "shrinkage": Range(0, 1, open_low=True),
        "restart_warmup": NOT_NEGATIVE,
    }

    def __init__(
        self,
        *,
        every: int = 50,
        blocks: int | None = None,
        shrinkage: float = 1.0,
        restart_warmup: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if restart_warmup is None:
            restart_warmup = min(every // 10, 50) if every > LONG_ROUND else 0
        if restart_warmup > every:
            raise UserError(
                f"restart_warmup={restart_warmup} is longer than a round of every={every} steps; "
                f"shorten it, or lengthen the round."
            )
        self.every, self.blocks, self.shrinkage = every, blocks, shrinkage
        self.restart_warmup = restart_warmup
        self.preserves_function = shrinkage == 1

    def rounds(self, total_steps: int) -> Rounds:
        return Rounds.of_length(self.every, total_steps)

    def prepare(self, model: nn.Module) -> None:
        for key, axis in rank_axes(model).items():
            if len(axis.members) > 1:
                raise UserError(
                    f"{key} is shared by {len(axis.members)} layers, and a booster of XGBLoRA "
                    f"belongs to one; use a method that shares no tensors, such as LoRA."
                )
        layers = wrapped_layers(model)
        for path, outermost in layers.items():
            for wrapper in live_wrappers(outermost):
                _check_booster(path, wrapper)
        self._count(len(group_by_block(model, layers)))
        super().prepare(model)

    def enter(self, number: int) -> None:
        if number == 0:
            self._check_sizes()
            merge_present_changes(self.layers)
        drawn = self._drawn_layers(number)
        for path, outermost in self.layers.items():
            for wrapper in live_wrappers(outermost):
                _set_sizes(wrapper, start_sizes(wrapper) if path in drawn else {})
                if path in drawn:
                    restart(path, wrapper, self.seed, number)
        self.forget(self.live_tensors())

    def leave(self, number: int) -> None:
        for path in self._drawn_layers(number):
            merge_into_ledger(self.layers[path], self.shrinkage)

    def rate(self, steps_done: int, group: Mapping[str, Any]) -> float:
        number, step = divmod(steps_done, self.every)
        if number == 0 or step >= self.restart_warmup:
            return 1.0
        return (step + 1) / self.restart_warmup

    def refuses_allocator(self, allocator: Participant) -> str:
        return (
            "it moves units, and XGBLoRA gives units to the blocks of a round and takes them from "
            "all others; leave one of the two out"
        )

    def trained_numbers(self, number: int) -> int:
        without = set(self.layers) - set(self._drawn_layers(number))
        idle: list[Parameterization] = []
        for path in without:
            idle += live_wrappers(self.layers[path])
        return self.run.trained() - sum(tensor.numel() for tensor in trained_tensors(idle))

    def describe_border(self, number: int) -> dict[str, Any]:
        return {
            "blocks": self.drawn_blocks(number),
            "shrinkage": self.shrinkage,
            **super().describe_border(number),
        }

    # ---- which blocks

    def drawn_blocks(self, number: int) -> list[str]:
        """Return the paths of the blocks that get boosters in a round, in the model's order."""
        blocks = list(group_by_block(self.run.model, self.layers))
        return draw_blocks(blocks, self._count(len(blocks)), self.seed, number)

    def _drawn_layers(self, number: int) -> list[str]:
        """Return the paths of the adapted layers of the blocks of a round."""
        groups = group_by_block(self.run.model, self.layers)
        paths = []
        for block in self.drawn_blocks(number):
            paths += groups[block]
        return paths

    def _count(self, available: int) -> int:
        """Return the number of blocks of a round, of those that a model has."""
        if self.blocks is None:
            return -(-available // 3)
        if self.blocks > available:
            raise UserError(
                f"blocks={self.blocks}: this model has {available} blocks with adapted layers; "
                f"give {available} or fewer."
            )
        return self.blocks

    def _check_sizes(self) -> None:
        """Refuse sizes that boosters would not keep, such as those of a rank_pattern."""
        for path, outermost in self.layers.items():
            for wrapper in live_wrappers(outermost):
                for axis, size in start_sizes(wrapper).items():
                    present = wrapper.axis_size(axis)
                    if present not in (0, size):
                        raise UserError(
                            f"{path}:{axis} has {present} units, and the boosters of XGBLoRA have "
                            f"the {size} of the adapter's own arguments; leave rank_pattern out, "
                            f"or set the rank in the adapter."
                        )


def draw_blocks(blocks: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    """Draw the blocks of a round, uniformly and without replacement.

    The draw depends on (seed, round) alone, so all processes and a resumed run draw the same.

    Args:
        blocks: names of all blocks.
        count: how many to draw.
        seed: seed of the strategy.
        number: number of the round.
    """
    order = torch.randperm(len(blocks), generator=generator(seed, "blocks", number))
    return [blocks[index] for index in sorted(order[:count].tolist())]


def start_sizes(wrapper: Parameterization) -> dict[str, int]:
    """Return axis -> units that the arguments of a wrapper give it."""
    fresh = built_again(wrapper, torch.Generator())
    return {axis: fresh.axis_size(axis) for axis in fresh.axes}


def _set_sizes(wrapper: Parameterization, sizes: Mapping[str, int]) -> None:
    """Give every axis of a wrapper its size, 0 if none is stated."""
    for axis in wrapper.axes:
        RankAxis(axis, [(wrapper, axis)]).resize_to(sizes.get(axis, 0))


def _check_booster(path: str, wrapper: Parameterization) -> None:
    """Refuse a method that trains something in a layer that gets no booster."""
    if all(wrapper.acts_without(axis) for axis in wrapper.axes):
        raise UserError(
            f"{path}: XGBLoRA takes the units of all blocks that it has not drawn, and "
            f"{type(wrapper).__name__} trains without units; use a method such as LoRA."
        )
