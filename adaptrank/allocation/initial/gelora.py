"""GeLoRA: ranks from the intrinsic dimension of what each block reads and gives, before training."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrank._collectives import from_all, from_first
from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.events import Event
from adaptrank.allocation.initial.blocks import cut, find_blocks
from adaptrank.allocation.initial.intrinsic_dimension import two_nn
from adaptrank.allocation.plans import apportion, in_steps
from adaptrank.parameterizations import named_layers, wrapped_layers, wrappers

log = logging.getLogger("adaptrank")


class GeLoRA(Allocator):
    """Choose the ranks to start from: block i gets max(d_{i+1} - d_i, 0) + 1, in every layer of it that has an adapter.

    d_i is the intrinsic dimension of what block i reads, d_{i+1} of what it gives, estimated by TwoNN (`two_nn`) from one
    vector for each of `samples` training examples, and rounded half up. The model is the frozen one: adapters are off, in evaluation
    mode, with no gradients. After that nothing moves, and another allocator may. Where dimensions fall from block to block most ranks
    are 1, by design. The event at step 0 holds the dimensions. alpha / rank stays what it was at construction, so alpha grows
    with the rank, as in the paper.

    The number of units has to bound the rank of the change. Where they are spread over parts of a layer, the rank of each part
    is rank / parts, rounded up. Layers outside of the repeated blocks keep their rank.

    Source: arXiv:2412.09250 (abstract and summaries; the formulas of rank and scale, and the estimator of a dimension per sample,
    are recalled, unverified; the number of samples and the pooling are ours). TwoNN comes out too low in high dimensions, so
    ranks are differences of biased numbers.
    Args:
        budget: total to share out in proportion to these ranks, at least 1 each, in `unit`; None takes them as they are, as the paper does.
        samples: number of training examples; fewer if the data end.
        pooling: how the tokens of an example become one vector: the "mean" of those that the attention mask lets through, the "last" of
            them, or the "first", which is the CLS token where there is one.
        estimator: "slope" is TwoNN's line through the origin, "mle" the maximum-likelihood estimate.
        unit, cap, seed: as in `Allocator`.
    Raises:
        ValueError: at the start of a run, if the layers are in no numbered blocks, or the examples are too few or too alike.
    """

    source = "arXiv:2412.09250"
    requires = frozenset({"matrix_rank"})
    moves = False

    def __init__(
        self,
        budget: int | None = None,
        samples: int = 2000,
        pooling: Literal["mean", "last", "first"] = "mean",
        estimator: Literal["slope", "mle"] = "slope",
        unit: Literal["ranks", "parameters"] = "ranks",
        cap: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, cap=cap, seed=seed)
        if samples < 3:
            raise UserError(
                f"samples={samples}: a dimension needs three points or more; the default is 2000."
            )
        if pooling not in ("mean", "last", "first") or estimator not in ("slope", "mle"):
            raise UserError(
                f"pooling={pooling!r}, estimator={estimator!r}: use 'mean', 'last' or 'first', and 'slope' or 'mle'."
            )
        self.samples, self.pooling, self.estimator = samples, pooling, estimator
        self._dimensions: list[float] = []

    def initial_ranks(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, int]:
        place, blocks = find_blocks(model, self.run.axes)
        self._say_what_does_not_hold(model, place, blocks)
        self._dimensions = from_first(self._measure(model, place, batches))
        of_block = ranks_of(self._dimensions)
        log.info(
            "GeLoRA: intrinsic dimensions %s, ranks %s.",
            [round(d, 1) for d in self._dimensions],
            of_block,
        )
        ranks = {
            key: max(of_block[i] for i in numbers) for key, numbers in blocks.items() if numbers
        }
        return self._sizes(ranks)

    def grounds(self) -> Event:
        return {"dimensions": [round(d, 3) for d in self._dimensions]}

    def _sizes(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Units for these ranks, within caps and the budget."""
        steps = {key: axis.step for key, axis in self.run.axes.items()}
        caps = {
            key: None if (cap := self.caps()[key]) is None else cap // steps[key]
            for key in self.run.axes
        }
        if self.budget is None:
            shares = {key: math.ceil(rank / steps[key]) for key, rank in ranks.items()}
            return cut(
                "GeLoRA",
                {key: share * steps[key] for key, share in shares.items()},
                self.caps(),
                steps,
            )
        outside = {key: size for key, size in self.sizes().items() if key not in ranks}
        shares = apportion(ranks, in_steps(self.cost(), steps, outside), self.budget, 1, caps)
        return {key: share * steps[key] for key, share in shares.items()}

    def _say_what_does_not_hold(
        self, model: nn.Module, place: str, blocks: Mapping[str, Sequence[int]]
    ) -> None:
        outside = [key for key, numbers in blocks.items() if not numbers]
        if outside:
            log.warning(
                "GeLoRA: %d axes lie outside of the blocks in %r and keep their rank: %s%s.",
                len(outside), place, ", ".join(outside[:3]), ", ..." if len(outside) > 3 else "",
            )  # fmt: skip
        ranked = {id(layer) for axis in self.run.axes.values() for layer, _ in axis.members}
        nests = [
            layer.nest
            for layer in wrapped_layers(model).values()
            if any(id(w) in ranked for w in layer.nest)
        ]
        fixed = sorted({type(w).__name__ for nest in nests for w in nest if not w.axes})
        if fixed:
            log.warning(
                "GeLoRA: %s changes the weight beside the low rank, so the bound that the ranks come from does not hold.",
                ", ".join(fixed),
            )

    @torch.no_grad()
    def _measure(self, model: nn.Module, place: str, batches: Iterable[Any]) -> list[float]:
        """Intrinsic dimension of what each block reads, and of what the last one gives."""
        modules = named_layers(model)
        prefix = f"{place}." if place else ""
        count = 0
        while f"{prefix}{count}" in modules:
            count += 1
        vectors: list[list[Tensor]] = [[] for _ in range(count + 1)]
        state: dict[str, Any] = {"mask": None}

        def see(boundary: int, values: Iterable[Any]) -> None:
            hidden = next(
                (v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None
            )
            if hidden is None:
                raise UserError(
                    f"GeLoRA finds no hidden states in what block {prefix}{boundary} reads."
                )
            vectors[boundary].append(pooled(hidden, state["mask"], self.pooling).float().cpu())

        def reads(
            boundary: int, block: nn.Module, values: tuple[Any, ...], named: dict[str, Any]
        ) -> None:
            see(boundary, [*values, *named.values()])

        def gives(block: nn.Module, values: Any, output: Any) -> None:
            see(count, _flat(output))

        wanted = math.ceil(self.samples / len(from_all(0)))
        moving = [
            w
            for w in wrappers(model)
            if w.enabled and any(p.requires_grad for _, p in w.own_parameters())
        ]
        hooks = [
            modules[f"{prefix}{i}"].register_forward_pre_hook(partial(reads, i), with_kwargs=True)
            for i in range(count)
        ]
        hooks.append(modules[f"{prefix}{count - 1}"].register_forward_hook(gives))
        try:
            for wrapper in moving:
                wrapper.enabled = False
            for batch in batches:
                state["mask"] = _attention_mask(batch)
                self.loss(batch)
                if sum(map(len, vectors[0])) >= wanted:
                    break
        finally:
            for wrapper in moving:
                wrapper.enabled = True
            for hook in hooks:
                hook.remove()
        return [
            self._dimension(boundary, prefix, seen, wanted) for boundary, seen in enumerate(vectors)
        ]

    def _dimension(self, boundary: int, prefix: str, seen: Sequence[Tensor], wanted: int) -> float:
        own = torch.cat([*seen])[:wanted] if seen else torch.empty(0, 1)
        points = torch.cat(from_all(own))[: self.samples]
        if boundary == 0 and len(points) < 100:
            log.warning(
                "GeLoRA: %d examples are few to tell a dimension from; give 100 or more, at best 2000.",
                len(points),
            )
        try:
            return two_nn(points, self.estimator)
        except ValueError as error:
            raise UserError(f"GeLoRA cannot tell what {prefix}{boundary} reads: {error}") from error


def ranks_of(dimensions: Sequence[float]) -> list[int]:
    """max(d_{i+1} - d_i, 0) + 1 of dimensions that are first rounded half up."""
    whole = [math.floor(dimension + 0.5) for dimension in dimensions]
    return [max(after - before, 0) + 1 for before, after in pairwise(whole)]


def pooled(hidden: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """One vector for each example: hidden (B, T, D) -> (B, D), by what the mask (B, T) lets through; any other shape as it is, (B, -1)."""
    if hidden.dim() != 3:
        return hidden.flatten(1)
    seen = torch.ones(hidden.shape[:2], device=hidden.device)
    if mask is not None and mask.shape == seen.shape:
        seen = (mask != 0).to(seen)
    if how == "mean":
        return (hidden.double() * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    if how == "last":
        chosen = (seen * places).argmax(1)
    else:
        chosen = (seen * (len(places) - places)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen]


def _attention_mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def _flat(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else [output]
