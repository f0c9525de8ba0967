"""BeamLoRA: inside each layer the weakest units become copies of the strongest."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.copying import copies, kinds_of
from adaptrank.allocation.gates import adam, leaf
from adaptrank.allocation.plans import Plan, Resize, Scores
from adaptrank.allocation.scores.elements import elements, zeros
from adaptrank.allocation.scores.importance import Axes
from adaptrank.axes import CostModel, RankAxis, generator


class BeamLoRA(Allocator):
    """A trained weight on each unit, w = softmax(s / tau) r with s (r,) from zero; each event copies strong units over weak ones.

    An axis keeps its size. Importance is w, which sums to r in each axis, so that axes compare. All w are sorted together, and units after
    the point where their sum passes p(t) of the whole are pruned, p(t) = 1 - (1 - p0) / 2 (1 + cos(pi t / t_end)), never more than half of
    an axis. Its K pruned units become copies of its K strongest, paired at random: slices and Adam's moments as they were half an interval
    ago (else equal units would get equal gradients for ever), s of both the mean of the two, without moments. So an event changes the
    function a little. `split="exact"` copies what is there now and gives both half of the weight, which does not, but for what
    was pruned; to tell the two apart it adds noise of 1e-3 to one factor of the copied unit and takes it from that of its copy.

    Where a layer has parts, and a unit belongs to one for good, a copy stays in its part; a part of one unit has none.
    It keeps three copies of the adapter between half an interval and the event. The last event multiplies w into the weights.

    Source: arXiv:2502.13604; rules from the authors' code: rank 64, alpha 128, tau 0.05, p0 0.95, an event every 3000 of 37,000 steps,
        t_end two thirds of them; the tables were not read. It decays s, which pulls it to uniform; here it does not decay.
    Args:
        p0: share of the weight that is kept at the first step.
        tau: temperature.
        until: t_end, in steps or a fraction of all; from there nothing is pruned.
        split: "snapshot", as released, or "exact".
        gate_lr_ratio: learning rate of s over that of the run.
        every, warmup, final, seed: as in `Allocator`.
    Raises:
        ValueError: for arguments out of range; at the start, if no axis has two units.
    """

    source = "arXiv:2502.13604"
    requires = frozenset({"duplicate"})
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
                f"p0={p0}, tau={tau}, gate_lr_ratio={gate_lr_ratio}: 0 < p0 <= 1, the others above 0."
            )
        if split not in ("snapshot", "exact"):
            raise UserError(f"split={split!r}; use 'snapshot' (as released) or 'exact'.")
        self.p0, self.tau, self.until, self.split, self.gate_lr_ratio = (
            p0,
            tau,
            until,
            split,
            gate_lr_ratio,
        )
        self._lr: float | None = None

    def begin(self, sizes: Mapping[str, int]) -> None:
        if max(sizes.values()) < 2:
            raise UserError(
                "BeamLoRA would never act: no axis has two units, one to copy and one to copy it to."
            )

    @property
    def _gated(self) -> bool:
        return self.steps_done < self.phases.end or self._owed

    def attach(self, axes: Axes) -> None:
        if self._gated:
            for axis in axes.values():
                self.logits(axis).requires_grad_()
                axis.gate = partial(self.gate, axis)

    def logits(self, axis: RankAxis) -> Tensor:
        """s of an axis, (units,)."""
        return self.track(axis, "s", leaf(axis))

    def gate(self, axis: RankAxis) -> Tensor:
        """w = softmax(s / tau) r, (units,); its sum is r."""
        return torch.softmax(self.logits(axis) / self.tau, dim=-1) * len(axis)

    def observe(self, axes: Axes) -> None:
        self._lr = self.optimizers[0].param_groups[0]["lr"] * self.gate_lr_ratio

    @torch.no_grad()
    def after_step(self, axes: Axes) -> None:
        lr, self._lr = self._lr, None
        if not self._tracked:
            return
        trained = {
            key: s for key, axis in axes.items() if (s := self.logits(axis)).grad is not None
        }
        if lr is not None and trained:
            first, second = (
                [self.track(axes[k], name, zeros(s)) for k, s in trained.items()] for name in "mv"
            )
            grads = [s.grad for s in trained.values() if s.grad is not None]
            steps = self.track(
                next(iter(axes.values())), "steps", torch.zeros((), dtype=torch.int64), None
            )
            adam(
                [s.detach() for s in trained.values()], grads, first, second, int(steps.add_(1)), lr
            )
        for s in trained.values():
            s.grad = None
        following = next((t for t in self.phases.events() if t > self.steps_done), None)
        if (
            self.split == "snapshot"
            and following is not None
            and following - self.steps_done == max(1, self.every // 2)
        ):
            self._snapshot(axes)

    def _snapshot(self, axes: Axes) -> None:
        for axis, name, tensor, where in self._states(axes):
            self.track(axis, name, zeros(tensor.detach()), where).copy_(tensor.detach())

    def _states(
        self, axes: Axes
    ) -> list[tuple[RankAxis, str, Tensor, tuple[tuple[str, int], ...]]]:
        """(owner, name, tensor, its dimensions that count units) of all that trains, and of the moments of its shape."""
        found = []
        for one in elements(axes):
            found.append((one.axis, f"old.{one.label}", one.tensor, one.where))
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(one.tensor, {}).items():
                    if isinstance(value, Tensor) and value.shape == one.tensor.shape:
                        found.append((one.axis, f"old.{one.label}.{key}", value, one.where))
        return found

    def score(self, axis: RankAxis) -> Tensor:
        return self.gate(axis).detach()

    def budget_at(self, step: int) -> int:
        return self._start_total

    def kept_at(self, step: int) -> float:
        """p(t): from p0 at the first step to 1 at `until`, on half a cosine."""
        end = self.until if isinstance(self.until, int) else self.until * self.phases.total
        progress = min(1.0, step / max(end, 1))
        return 1 - (1 - self.p0) / 2 * (1 + math.cos(math.pi * progress))

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        if step >= self.phases.end:
            return {}
        plan: Plan = {}
        kinds = {key: kinds_of(self._axes[key]) for key in scores}
        for key, pairs in copies(scores, self.kept_at(step), self.seed, step, kinds).items():
            keep = list(range(len(scores[key])))
            for source, target in pairs:
                keep[target] = source
            plan[key] = Resize(tuple(keep))
        return plan

    def carried_out(self, plan: Plan, step: int) -> None:
        pairs = {}
        for key, change in plan.items():
            assert isinstance(change, Resize)
            pairs[key] = [
                (source, target) for target, source in enumerate(change.keep) if source != target
            ]
        for key, copied in pairs.items():
            self._settle(self._axes[key], copied, step)
        if self.split == "snapshot":
            self._restore({key: [target for _, target in copied] for key, copied in pairs.items()})
        if step >= self.phases.end:
            for axis in self._axes.values():
                axis.fold()
            self._tracked.clear()

    @torch.no_grad()
    def _settle(self, axis: RankAxis, pairs: Sequence[tuple[int, int]], step: int) -> None:
        """After the copy: s of both, and what tells them apart. `s` has followed: target holds the source's."""
        s, sources, targets = self.logits(axis), [a for a, _ in pairs], [b for _, b in pairs]
        if self.split == "exact":
            s[sources] -= self.tau * math.log(2)
            s[targets] = s[sources]
            self._tell_apart(axis, sources, targets, step)
        else:
            before = self._before[axis.key]
            s[sources] = s[targets] = (before[sources] + before[targets]) / 2
        for moment in "mv":
            self.track(axis, moment, zeros(s))[[*sources, *targets]] = 0

    def _tell_apart(
        self, axis: RankAxis, sources: Sequence[int], targets: Sequence[int], step: int
    ) -> None:
        """Opposite noise in one factor of both: a unit is linear in it, and both weigh the same, so that their sum stays."""
        slot = next((s for s in axis.slots() if s.tensor.requires_grad and not s.closes), None)
        if slot is not None:
            values = slot.select(sources)
            drawn = torch.randn(
                values.shape, generator=generator(self.seed, f"{axis.key}/split", step)
            )
            noise = 1e-3 * values.square().mean().sqrt() * drawn.to(values)
            for units, sign in ((sources, 1), (targets, -1)):
                index = torch.tensor(units, device=values.device)
                slot.tensor.data.index_add_(slot.dim, index, noise, alpha=sign)

    @torch.no_grad()
    def _restore(self, targets: Mapping[str, Sequence[int]]) -> None:
        """Give the copies the values and moments of the snapshot, which has followed; it is used up."""
        for axis, name, tensor, where in self._states(self._axes):
            old = self._tracked[axis.key].pop(name, None)
            if old is not None:
                for key, dim in where:
                    index = torch.tensor(
                        targets.get(key, ()), dtype=torch.long, device=tensor.device
                    )
                    tensor.data.index_copy_(dim, index, old.tensor.index_select(dim, index))

    def scores(self, axes: Axes) -> Scores:
        self._before = {key: self.logits(axis).detach().clone() for key, axis in axes.items()}
        return super().scores(axes)
