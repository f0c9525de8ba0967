"""BeamLoRA: inside each layer the weakest units become copies of the strongest."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation.context import Axes
from adaptrank.allocation.copying import Pair, copies, kinds_of
from adaptrank.allocation.events import Event
from adaptrank.allocation.plans import Plan, Resize, Scores
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.schedules import check_length
from adaptrank.allocation.scores.elements import elements, zeros
from adaptrank.allocation.state import Tracked
from adaptrank.allocation.trained_gates import TrainedGates
from adaptrank.axes import CostModel, RankAxis, generator, shift_copies, states_of

SPLIT_NOISE = 1e-3
"""Noise that tells a unit from its copy, relative to the root mean square of the factor."""

SNAPSHOT = "old."
"""Start of the names of a snapshot's tensors."""


@dataclass(frozen=True)
class _Trained:
    """A trained tensor, or a moment of it, with the axes that it follows."""

    axis: RankAxis
    name: str
    tensor: Tensor
    where: tuple[tuple[str, int], ...]


class BeamState(TrainedGates):
    """Logits s with their moments, and a snapshot of the adapter half an interval ago."""

    def __init__(self) -> None:
        super().__init__("s")

    def updated(self) -> Iterator[tuple[str, str, Tracked]]:
        """Yield logits and their moments. No update of a step changes the snapshot."""
        for key, name, tracked in self.items():
            if not name.startswith(SNAPSHOT):
                yield key, name, tracked

    def take_snapshot(self, tensors: Sequence[_Trained]) -> None:
        """Copy what is trained and its moments; the copies follow the next event."""
        for entry in tensors:
            value = entry.tensor.detach()
            self.track(entry.axis, entry.name, zeros(value), entry.where).copy_(value)

    def use_snapshot(self, tensors: Sequence[_Trained], targets: Mapping[str, list[int]]) -> None:
        """Give the target units of each axis their values in the snapshot, and drop it."""
        for entry in tensors:
            stored = self.pop(entry.axis, entry.name)
            if stored is None:
                continue
            for key, dim in entry.where:
                units = torch.tensor(
                    targets.get(key, ()), dtype=torch.long, device=entry.tensor.device
                )
                entry.tensor.data.index_copy_(dim, units, stored.index_select(dim, units))


class BeamLoRA(Policy[BeamState]):
    """Train a weight on each unit, and let each event copy strong units over weak ones.

    The weight of a unit is w = softmax(s / tau) r, with logits s (r,) that start at zero. An axis
    keeps its size. The importance of a unit is w, which sums to r in each axis, so that axes
    compare. All w are sorted together. Units after the point where their sum passes the share p(t)
    of the whole are pruned, p(t) = 1 - (1 - p0) / 2 (1 + cos(pi t / t_end)), but never more than
    half of an axis.

    The K pruned units of an axis become copies of its K strongest, paired at random. A copy takes
    slices and Adam moments as they were half an interval ago; otherwise equal units would get equal
    gradients for ever. The logits of both become the mean of the two. An event sets the moments of
    all logits to zero, as in the release, also where nothing was pruned. So an event changes the
    function a little. `split="exact"` copies the present slices and gives both units half of the
    weight. That changes nothing but the pruned units. To tell the two apart it adds noise of 1e-3
    to one factor of the copied unit, and subtracts it from that of its copy. Only the logits of
    these units lose their moments.

    The logits of an axis follow the learning rate of the parameter group that holds its closing
    factor (B of LoRA), at its place in the schedule.

    Where a layer has parts, and a unit belongs to one for good, a copy stays in its part. A part of
    one unit has no copies. The snapshot takes three copies of the adapter between half an interval
    and the event. The last event multiplies w into the weights.

    Source: arXiv:2502.13604; rules from the authors' code: rank 64, alpha 128, tau 0.05, p0 0.95,
    an event every 3000 of 37,000 steps, t_end two thirds of them. The tables were not read. In the
    release s is in the optimizer of the factors, whose weight decay is 0 in its script. Here s
    never decays, since decay would pull it to uniform.

    Args:
        p0: share of the weight that is kept at the first step.
        tau: temperature of the softmax.
        until: t_end, in steps or as a fraction of all; from there on nothing is pruned.
        split: "snapshot", as released, or "exact".
        gate_lr_ratio: learning rate of the logits of an axis over that of its closing factor.
        every, warmup, final, seed: as in `Policy`.
    Raises:
        ValueError: for arguments out of range; at the start, if no axis has two units.
    """

    source = "arXiv:2502.13604"
    requires = frozenset({"duplicate"})
    hangs_gates = True
    exclusive = True

    def __init__(
        self,
        p0: float = 0.95,
        tau: float = 0.05,
        until: int | float = 0.67,
        split: Literal["snapshot", "exact"] = "snapshot",
        gate_lr_ratio: float = 1.0,
        every: int = 50,
        warmup: int | float = 0.0,
        final: int | float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(None, "ranks", every, warmup, final, seed=seed)
        if not 0 < p0 <= 1 or tau <= 0 or gate_lr_ratio <= 0:
            raise UserError(
                f"p0={p0}, tau={tau}, gate_lr_ratio={gate_lr_ratio}: 0 < p0 <= 1, the others "
                f"above 0."
            )
        check_length("until", until)
        if split not in ("snapshot", "exact"):
            raise UserError(f"split={split!r}; use 'snapshot' (as released) or 'exact'.")
        self.p0, self.tau, self.until, self.split = p0, tau, until, split
        self.gate_lr_ratio = gate_lr_ratio

    def init_state(self, axes: Axes) -> BeamState:
        return BeamState()

    def install(self, state: BeamState, axes: Axes) -> None:
        """Multiply every unit by its weight."""
        if self.run.moves_left:
            for axis in axes.values():
                state.values(axis).requires_grad_()
                axis.gate = partial(self.weights, state, axis)

    def weights(self, state: BeamState, axis: RankAxis) -> Tensor:
        """Return w = softmax(s / tau) r, (units,); its sum is r."""
        return torch.softmax(state.values(axis) / self.tau, dim=-1) * len(axis)

    def update(self, state: BeamState, axes: Axes) -> None:
        """Train the logits. No other tensor of the step depends on them."""
        gradients = state.with_gradient(axes)
        if gradients:
            rates = self.run.learning_rates(axes)
            rates = {key: rate * self.gate_lr_ratio for key, rate in rates.items()}
            state.adam_step(axes, gradients, rates)

    def finish_step(self, state: BeamState, axes: Axes) -> None:
        if not state:
            return
        state.clear_gradients(axes)
        step = self.run.steps_done
        next_event = next((event for event in self.run.phases.events() if event > step), None)
        half_interval = max(1, self.every // 2)
        due = next_event is not None and next_event - step == half_interval
        if self.split == "snapshot" and due:
            state.take_snapshot(self.trained_tensors(axes))

    def score_units(self, state: BeamState, axes: Axes) -> Scores:
        return {key: self.weights(state, axis).detach() for key, axis in axes.items()}

    def budget_at(self, step: int) -> int:
        return self.run.start_total

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        if step >= self.run.phases.end:
            return {}
        kinds = {key: kinds_of(self.run.axes[key]) for key in scores}
        plan: Plan = {}
        for key, pairs in copies(scores, self.kept_at(step), self.seed, step, kinds).items():
            keep = list(range(len(scores[key])))
            for source, target in pairs:
                keep[target] = source
            plan[key] = Resize(tuple(keep))
        return plan

    def kept_at(self, step: int) -> float:
        """Return p(t): from p0 at the first step to 1 at `until`, on half a cosine."""
        total = self.run.phases.total
        end = self.until if isinstance(self.until, int) else self.until * total
        progress = min(1.0, step / max(end, 1))
        return 1 - (1 - self.p0) / 2 * (1 + math.cos(math.pi * progress))

    def carry_out(
        self, state: BeamState, plan: Plan, step: int, apply: Callable[[Plan, int], Event]
    ) -> Event:
        axes = self.run.axes
        logits = {key: state.values(axis).detach().clone() for key, axis in axes.items()}
        done = apply(plan, step)
        pairs = {key: _pairs(change) for key, change in plan.items()}
        for key, copied in pairs.items():
            if self.split == "exact":
                self.split_exactly(state, axes[key], copied, step)
            else:
                self.share_logits(state, axes[key], copied, logits[key])
        if self.split == "snapshot":
            targets = {key: _split(copied)[1] for key, copied in pairs.items()}
            state.use_snapshot(self.trained_tensors(axes), targets)
            for axis in axes.values():
                state.clear_moments(axis, [*range(len(axis))])
        if step >= self.run.phases.end:
            for axis in axes.values():
                axis.fold(self.run.optimizers)
            state.clear()
        return done

    def check_start(self, sizes: Mapping[str, int]) -> None:
        if max(sizes.values()) < 2:
            raise UserError(
                "BeamLoRA would never act: no axis has two units, one to copy and one to copy it "
                "to."
            )

    @torch.no_grad()
    def share_logits(
        self, state: BeamState, axis: RankAxis, pairs: Sequence[Pair], before: Tensor
    ) -> None:
        """Give a unit and its copy the mean of their logits before the copy."""
        sources, targets = _split(pairs)
        logits = state.values(axis)
        mean = (before[sources] + before[targets]) / 2
        logits[sources] = mean
        logits[targets] = mean

    @torch.no_grad()
    def split_exactly(
        self, state: BeamState, axis: RankAxis, pairs: Sequence[Pair], step: int
    ) -> None:
        """Give a unit and its copy half of the weight each, and tell them apart by noise.

        A unit is linear in one factor, and both weigh the same, so opposite noise in this factor
        leaves their sum as it is.
        """
        sources, targets = _split(pairs)
        logits = state.values(axis)
        logits[sources] -= self.tau * math.log(2)
        logits[targets] = logits[sources]
        self.add_noise(axis, sources, targets, step)
        state.clear_moments(axis, [*sources, *targets])

    def add_noise(
        self, axis: RankAxis, sources: Sequence[int], targets: Sequence[int], step: int
    ) -> None:
        """Add noise to one trained factor of the sources, and subtract it from the targets."""
        opening = [slot for slot in axis.slots() if slot.tensor.requires_grad and not slot.closes]
        if not opening:
            return
        slot = opening[0]
        values = slot.select(sources)
        drawn = torch.randn(values.shape, generator=generator(self.seed, f"{axis.key}/split", step))
        noise = SPLIT_NOISE * values.square().mean().sqrt() * drawn.to(values)
        for units, sign in ((sources, 1), (targets, -1)):
            index = torch.tensor(units, device=values.device)
            slot.tensor.data.index_add_(slot.dim, index, noise, alpha=sign)
            shift_copies(slot.tensor, slot.dim, index, sign * noise, self.run.optimizers)

    def trained_tensors(self, axes: Axes) -> list[_Trained]:
        """Return everything that is trained on the axes, and the optimizer's moments of it."""
        return list(self._trained_tensors(axes))

    def _trained_tensors(self, axes: Axes) -> Iterator[_Trained]:
        for element in elements(axes):
            name = f"{SNAPSHOT}{element.label}"
            yield _Trained(element.axis, name, element.tensor, element.where)
            for key, _, value in states_of(element.tensor, self.run.optimizers):
                yield _Trained(element.axis, f"{name}.{key}", value, element.where)


def _pairs(change: object) -> list[Pair]:
    """Return the (source, target) pairs of a plan that copies units."""
    assert isinstance(change, Resize)
    return [(source, target) for target, source in enumerate(change.keep) if source != target]


def _split(pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
    """Return the sources and the targets."""
    return [source for source, _ in pairs], [target for _, target in pairs]
