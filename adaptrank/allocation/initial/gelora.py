"""GeLoRA: ranks from the intrinsic dimensions of the hidden states, before training."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrank._collectives import from_all, from_first
from adaptrank._errors import UserError
from adaptrank.allocation.context import Axes
from adaptrank.allocation.initial.blocks import cut, find_blocks, warn_outside
from adaptrank.allocation.initial.hidden_states import (
    HiddenStates,
    Pooling,
    adapters_off,
    attention_mask,
)
from adaptrank.allocation.initial.initializer import Choice, RankInitializer
from adaptrank.allocation.initial.intrinsic_dimension import two_nn
from adaptrank.allocation.plans import apportion
from adaptrank.parameterizations import wrapped_layers

log = logging.getLogger("adaptrank")

FEW_EXAMPLES = 100
"""Below this number of examples a warning says that they are few."""


class GeLoRA(RankInitializer):
    """Give block i the rank max(d_{i+1} - d_i, 0) + 1, in each of its layers with an adapter.

    d_i is the intrinsic dimension of the inputs of block i, and d_{i+1} that of its outputs. They
    are estimated by TwoNN (`two_nn`) from one vector for each of `samples` training examples, and
    rounded half up. The model is the frozen one: adapters are off, in evaluation mode, without
    gradients. Afterwards nothing moves, and another allocator may move the ranks. If dimensions
    fall from block to block, most ranks are 1, by design. The event at step 0 holds the
    dimensions. alpha / rank stays what it was at construction, so alpha grows with the rank, as in
    the paper.

    The number of units has to bound the rank of the change. If units are spread over parts of a
    layer, the rank of each part is rank / parts, rounded up. Layers outside of the repeated blocks
    keep their rank.

    Source: arXiv:2412.09250 (abstract and summaries). The formulas of rank and scale, and the
    estimator of a dimension from one vector an example, are recalled and unverified. The number of
    samples and the pooling are ours. TwoNN comes out too low in high dimensions, so ranks are
    differences of biased numbers.

    Args:
        budget: total to share out in proportion to these ranks, at least 1 each, in `unit`. None
            takes them as they are, as the paper does.
        samples: number of training examples, or fewer if the data end.
        pooling: how the tokens of an example become one vector: the "mean" of the tokens that the
            attention mask lets through, the "last" of them, or the "first" (the CLS token if there
            is one).
        estimator: "slope" is TwoNN's line through the origin, "mle" the maximum-likelihood
            estimate.
        unit, cap, seed: as in `RankInitializer`.
    Raises:
        UserError: for arguments out of range. At the start of a run: if the layers are in no
            numbered blocks, or the examples are too few or too alike.
    """

    source = "arXiv:2412.09250"
    requires = frozenset({"matrix_rank"})

    def __init__(
        self,
        budget: int | None = None,
        samples: int = 2000,
        pooling: Pooling = "mean",
        estimator: Literal["slope", "mle"] = "slope",
        unit: Literal["ranks", "parameters"] = "ranks",
        cap: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, cap=cap, seed=seed, final=0.3)
        # The method has no phases. Checkpoints hold these, and a resumed run compares them.
        self.warmup = 0.1
        if samples < 3:
            raise UserError(
                f"samples={samples}: a dimension needs three points or more. The default is 2000."
            )
        if pooling not in ("mean", "last", "first") or estimator not in ("slope", "mle"):
            raise UserError(
                f"pooling={pooling!r}, estimator={estimator!r}: use 'mean', 'last' or 'first', and "
                f"'slope' or 'mle'."
            )
        self.samples, self.pooling, self.estimator = samples, pooling, estimator

    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice:
        place, blocks = find_blocks(self.run.model, axes)
        warn_outside("GeLoRA", place, [key for key, numbers in blocks.items() if not numbers])
        warn_unbounded(self.run.model, axes)
        dimensions = from_first(self._dimensions(place, batches))
        rank_of_block = ranks_of(dimensions)
        log.info(
            "GeLoRA: intrinsic dimensions %s, ranks %s.",
            [round(dimension, 1) for dimension in dimensions],
            rank_of_block,
        )
        ranks = {}
        for key, numbers in blocks.items():
            if numbers:
                ranks[key] = max(rank_of_block[number] for number in numbers)
        facts = [round(dimension, 3) for dimension in dimensions]
        return Choice(self._sizes(ranks, axes), facts={"dimensions": facts})

    def _dimensions(self, place: str, batches: Iterable[Any]) -> list[float]:
        """Return the intrinsic dimension of each block's inputs, and of the last outputs."""
        processes = len(from_all(0))
        wanted = math.ceil(self.samples / processes)
        states = HiddenStates(self.run.model, place, self.pooling)
        with torch.no_grad(), adapters_off(self.run.model), states.watching():
            for batch in batches:
                states.mask = attention_mask(batch)
                self.run.loss(batch)
                if states.count() >= wanted:
                    break
        dimensions = []
        for boundary, vectors in enumerate(states.vectors):
            points = self._points(vectors, wanted)
            if boundary == 0 and len(points) < FEW_EXAMPLES:
                log.warning(
                    "GeLoRA: %d examples are few to tell a dimension from. Give 100 or more, at "
                    "best 2000.",
                    len(points),
                )
            try:
                dimensions.append(two_nn(points, self.estimator))
            except ValueError as error:
                raise UserError(
                    f"GeLoRA cannot tell what {states.prefix}{boundary} reads: {error}"
                ) from error
        return dimensions

    def _points(self, vectors: Sequence[Tensor], wanted: int) -> Tensor:
        """Return the vectors of all processes, at most `wanted` of each, (N, D)."""
        of_process = torch.cat([*vectors])[:wanted] if vectors else torch.empty(0, 1)
        return torch.cat(from_all(of_process))[: self.samples]

    def _sizes(self, ranks: Mapping[str, int], axes: Axes) -> dict[str, int]:
        """Return the units for these ranks, within caps and the budget."""
        steps = {key: axis.step for key, axis in axes.items()}
        caps = self.caps()
        if self.budget is None:
            sizes = {}
            for key, rank in ranks.items():
                sizes[key] = math.ceil(rank / steps[key]) * steps[key]
            return cut("GeLoRA", sizes, caps, steps)
        most_steps: dict[str, int | None] = {}
        for key, cap in caps.items():
            most_steps[key] = None if cap is None else cap // steps[key]
        outside = {key: size for key, size in self.run.sizes().items() if key not in ranks}
        cost = self.run.cost().in_steps(steps, outside)
        shares = apportion(ranks, cost, self.budget, 1, most_steps)
        return {key: share * steps[key] for key, share in shares.items()}


def ranks_of(dimensions: Sequence[float]) -> list[int]:
    """Return max(d_{i+1} - d_i, 0) + 1 of dimensions that are first rounded half up."""
    whole = [math.floor(dimension + 0.5) for dimension in dimensions]
    return [max(outputs - inputs, 0) + 1 for inputs, outputs in pairwise(whole)]


def warn_unbounded(model: nn.Module, axes: Axes) -> None:
    """Say if a wrapper without an axis changes the weight of a layer beside the low rank."""
    ranked: set[int] = set()
    for axis in axes.values():
        ranked.update(id(layer) for layer, _ in axis.members)
    unbounded: set[str] = set()
    for layer in wrapped_layers(model).values():
        if any(id(wrapper) in ranked for wrapper in layer.nest):
            unbounded.update(type(wrapper).__name__ for wrapper in layer.nest if not wrapper.axes)
    if unbounded:
        log.warning(
            "GeLoRA: %s changes the weight beside the low rank, so the bound that the ranks come "
            "from does not hold.",
            ", ".join(sorted(unbounded)),
        )
