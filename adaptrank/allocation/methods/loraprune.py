"""LoRAPrune: heads and channels of the frozen weights are pruned by the gradients of an adapter."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank._options import DECAY
from adaptrank.allocation.context import Axes
from adaptrank.allocation.events import Event
from adaptrank.allocation.plans import Close, Plan, Scores, ranked
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.scores.elements import zeros
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import PRUNED, CostModel, Groups, RankAxis, find_groups


class GroupAverages(TrackedTensors):
    """Running average of the importance of each group."""

    def importance(self, axis: RankAxis, like: Tensor) -> Tensor:
        """Return the running average of an axis, (groups,)."""
        return self.track(axis, "importance", zeros(like))


class LoRAPrune(Policy[GroupAverages]):
    """Prune groups of rows and columns of the frozen W, by |G W'| with an estimated gradient G.

    With LoRA, G = gB A + B gA - gB gA, where gX is dL/dX: no gradient of W is needed. A group is an
    attention head (with the key and value head that it shares), or a channel of an MLP. In each
    layer the sums over the groups are divided by their L2 norm. They are added over the layers of a
    group and averaged over the steps, I <- beta I + (1 - beta) I_new. If a sum is not a number the
    previous average stays.

    Within each layer the least important floor(n rho) groups are masked, with
    rho(t) = sparsity (1 - (1 - p)^3) and p from 0 to 1 between warm-up and the final phase. A
    masked group stays masked: its score is the average times its mask, and so 0. The first
    floor(0.1 L) of the L layers of the model and the last one are left whole. Masks are in force
    during training, in the checkpoint, and in the adapter's file: `load_adapter` cuts the groups
    out, so that the loaded model is really smaller.

    Source: arXiv:2305.18403; rules from the authors' code: sparsity 0.5, an event every 10 steps,
    10 % warm-up and 10 % at the end, beta 0.9, LoRA of rank 8 with alpha 16. It scores after
    clipping, which makes no difference after division by the L2 norm. It has no event at which
    p is 1, and so ends a little below its sparsity. The tables were not read in full.

    Args:
        sparsity: rho at the end, the share of the groups of a layer that is masked, in (0, 1).
        whole: share of the model's layers, counted from the first and rounded down, that lose
            nothing. The last layer never does.
        beta: decay of the running average.
        every, warmup, final: as in `Policy`.
    Raises:
        ValueError: if sparsity or whole is out of range; at the start, if no group has a layer
            that is wrapped, or only groups that are left whole.
    """

    source = "arXiv:2305.18403"
    ranges: ClassVar = {"beta": DECAY}
    requires = frozenset({"weight_gradient"})
    exclusive = True
    masks_base = True

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
                f"sparsity={sparsity}, whole={whole}: give shares, 0 < sparsity < 1 and "
                f"0 <= whole < 1."
            )
        self.sparsity, self.whole, self.beta = sparsity, whole, beta

    def find_axes(self, model: nn.Module) -> Axes:
        """Return the wrapped groups of all layers but the first and the last ones.

        Raises:
            UserError: if these are the only layers that are wrapped.
        """
        groups = find_groups(model)
        if not groups:
            return {}
        layers = list(dict.fromkeys(layer_of(key) for key in find_groups(model, wrapped=False)))
        first = layers[: math.floor(self.whole * len(layers) + 1e-9)]
        spared = {*first, layers[-1]}
        allocated = {key: axis for key, axis in groups.items() if layer_of(key) not in spared}
        if not allocated:
            raise UserError(
                f"LoRAPrune prunes nothing in the first {len(first)} of {len(layers)} layers nor "
                f"in the last one, and no other layer has an adapter; adapt the layers between."
            )
        return allocated

    def init_state(self, axes: Axes) -> GroupAverages:
        return GroupAverages()

    def install(self, state: GroupAverages, axes: Axes) -> None:
        """Mask the closed groups in every forward pass.

        The hooks stay after training: without the masks the model would not be the one that was
        trained.
        """
        for key, axis in _groups(axes):
            axis.close(self.run.progress.closed.get(key, ()))
            axis.reader.register_forward_pre_hook(axis.mask)
        self._note_kept_groups()

    def update(self, state: GroupAverages, axes: Axes) -> None:
        for _, axis in _groups(axes):
            importance = axis.importance()
            average = state.importance(axis, importance)
            averaged = average.lerp(importance, 1 - self.beta)
            average.copy_(torch.where(importance.isfinite().all(), averaged, average))

    def score_units(self, state: GroupAverages, axes: Axes) -> Scores:
        scores = {}
        for key, axis in _groups(axes):
            importance = state.importance(axis, torch.zeros(len(axis)))
            scores[key] = importance * axis.open.to(importance)
        return scores

    def budget_at(self, step: int) -> int:
        progress = self.run.phases.progress(step)
        sizes = self.run.sizes().values()
        return sum(size - masked_groups(size, self.sparsity, progress) for size in sizes)

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        progress = self.run.phases.progress(step)
        return mask_within_layers(scores, self.sparsity, progress, self.run.progress.closed)

    def carry_out(
        self, state: GroupAverages, plan: Plan, step: int, apply: Callable[[Plan, int], Event]
    ) -> Event:
        done = apply(plan, step)
        self._note_kept_groups()
        return done

    def _note_kept_groups(self) -> None:
        """Write down on the model which groups are left; the adapter's file says so."""
        kept = {}
        for key, closed in self.run.progress.closed.items():
            kept[key] = [group for group in range(self.run.sizes()[key]) if group not in closed]
        self.run.model.__dict__[PRUNED] = kept


def _groups(axes: Axes) -> Iterator[tuple[str, Groups]]:
    for key, axis in axes.items():
        assert isinstance(axis, Groups)
        yield key, axis


def layer_of(key: str) -> str:
    """Return the path of a group's block: the key up to its last number."""
    parts = key.rpartition(":")[0].split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    last = max(numbers, default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def masked_groups(size: int, sparsity: float, progress: float) -> int:
    """Return how many groups of a layer are masked: floor(n sparsity (1 - (1 - p)^3))."""
    share = sparsity * (1 - (1 - progress) ** 3)
    return min(size - 1, math.floor(size * share + 1e-9))


def mask_within_layers(
    scores: Mapping[str, Tensor],
    sparsity: float,
    progress: float,
    masked: Mapping[str, Sequence[int]],
) -> Plan:
    """Close the least important groups of each layer; of equal groups the higher one.

    Args:
        scores: key -> importance, (groups,).
        sparsity: share of the groups that is masked at the end.
        progress: progress of the schedule, from 0 to 1.
        masked: key -> groups that are masked already. They stay masked.
    """
    plan: Plan = {}
    for key, values in scores.items():
        already = masked.get(key, ())
        kept = len(values) - masked_groups(len(values), sparsity, progress)
        open_groups = [group for group in ranked(values) if group not in already]
        closed = {*already, *open_groups[kept:]}
        if closed:
            plan[key] = Close(tuple(sorted(closed)))
    return plan
