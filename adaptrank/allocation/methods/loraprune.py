"""LoRAPrune: heads and channels of the frozen weights go, as the gradients of an adapter say."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.plans import Close, Plan, Scores, ranked
from adaptrank.allocation.scores.elements import zeros
from adaptrank.allocation.scores.importance import Axes
from adaptrank.axes import CostModel, RankAxis, rank_cost
from adaptrank.axes import groups as groups


class LoRAPrune(Allocator):
    """Prune the base, not the adapter: groups of rows and columns of W, by |G W'| with G estimated from the adapter's gradients.

    With LoRA, G = gB A + B gA - gB gA, where gX is dL/dX: no gradient of W is needed. A group is an attention head (with the key and value
    head it shares), or a channel of an MLP. Of each layer the sums over the groups are divided by their L2 norm, then added over the layers
    of a group, and averaged over the steps, I <- beta I + (1 - beta) I_new. Where a sum is not a number the old one stays.

    Within each layer the least important floor(n rho) groups are masked, rho(t) = sparsity (1 - (1 - p)^3), p from 0 to 1 between
    warm-up and the final phase; the first 10 % of the layers and the last one are left whole. Masks are in force while it trains, in the
    checkpoint, and in the adapter's file: `load_adapter` cuts the groups out, so that the loaded model is really smaller.

    Source: arXiv:2305.18403; rules from the authors' code: sparsity 0.5, an event every 10 steps, 10 % warm-up and 10 % at the end, beta
        0.9, LoRA of rank 8 with alpha 16. It scores after clipping, which the L2 norm makes the same. Tables were not read in full.
    Args:
        sparsity: rho at the end, the share of the groups of a layer that go, in (0, 1).
        whole: share of the layers, counted from the first, that lose nothing; the last one never does.
        beta: of the running average.
        every, warmup, final: as in `Allocator`.
    Raises:
        ValueError: if sparsity or whole is out of range; at the start, if no group has a layer that is wrapped.
    """

    source = "arXiv:2305.18403"
    requires = frozenset({"weight_gradient"})
    exclusive = True

    def __init__(
        self,
        sparsity: float = 0.5,
        whole: float = 0.1,
        beta: float = 0.9,
        every: int = 10,
        warmup: int | float = 0.1,
        final: int | float = 0.1,
    ) -> None:
        super().__init__(None, "ranks", every, warmup, final)
        if not 0 < sparsity < 1 or not 0 <= whole < 1:
            raise UserError(
                f"sparsity={sparsity}, whole={whole}: give shares, 0 < sparsity < 1 and 0 <= whole < 1."
            )
        self.sparsity, self.whole, self.beta = sparsity, whole, beta

    def find_axes(self, model: nn.Module) -> Axes:
        found = groups.find_groups(model)
        if not found:
            return {}
        layers = list(dict.fromkeys(layer_of(key) for key in found))
        spared = {*layers[: math.ceil(self.whole * len(layers))], layers[-1]}
        return {key: axis for key, axis in found.items() if layer_of(key) not in spared} or found

    def cost(self) -> CostModel:
        return rank_cost(self._axes)

    def attach(self, axes: Axes) -> None:
        for key, axis in axes.items():
            assert isinstance(axis, groups.Groups)
            axis.close(self.closed.get(key, ()))
            self.handles.append(axis.reader.register_forward_pre_hook(axis.mask))
        self._note()

    def observe(self, axes: Axes) -> None:
        for axis in axes.values():
            assert isinstance(axis, groups.Groups)
            new = axis.importance()
            if bool(new.isfinite().all()):
                self.track(axis, "importance", zeros(new)).lerp_(new, 1 - self.beta)

    def score(self, axis: RankAxis) -> Tensor:
        return self.track(axis, "importance", torch.zeros(len(axis)))

    def budget_at(self, step: int) -> int:
        return sum(
            size - gone(size, self.sparsity, self.phases.progress(step))
            for size in self.sizes().values()
        )

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        return local(scores, self.sparsity, self.phases.progress(step))

    def carried_out(self, plan: Plan, step: int) -> None:
        self._note()

    def _note(self) -> None:
        """What the file of an adapter says of the groups that are left."""
        kept = {
            k: [i for i in range(n) if i not in self.closed.get(k, ())]
            for k, n in self.sizes().items()
            if k in self.closed
        }
        self.model.__dict__[groups.PRUNED] = kept

    def finish(self) -> None:
        """Masks stay: without them the model would not be the one that was trained."""
        self._running = False


def layer_of(key: str) -> str:
    """The path of a group's block: up to its last number."""
    parts = key.rpartition(":")[0].split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def gone(size: int, sparsity: float, progress: float) -> int:
    """Groups of a layer that are masked: floor(n rho), rho = sparsity (1 - (1 - p)^3)."""
    return min(size - 1, math.floor(size * sparsity * (1 - (1 - progress) ** 3) + 1e-9))


def local(scores: Mapping[str, Tensor] | Scores, sparsity: float, progress: float) -> Plan:
    """Of each layer by itself the least important groups; ties lose the higher one."""
    plan: Plan = {}
    for key, values in scores.items():
        lost: Sequence[int] = ranked(values)[len(values) - gone(len(values), sparsity, progress) :]
        if lost:
            plan[key] = Close(tuple(sorted(lost)))
    return plan
