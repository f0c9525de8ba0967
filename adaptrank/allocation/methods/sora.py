"""SoRA: a trained gate on each unit, and a proximal step that sets small ones to exactly zero."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.gates import adam, leaf, soft_threshold, threshold_for
from adaptrank.allocation.plans import Plan, Resize, Scores, keep_best, ranked
from adaptrank.allocation.schedules import cubic
from adaptrank.allocation.scores.elements import zeros
from adaptrank.allocation.scores.importance import Axes
from adaptrank.axes import CostModel, RankAxis, generator


class SoRA(Allocator):
    """Start with many units and train a gate g on each; after each step g <- sign(g) max(|g| - xi, 0), and what is zero at the end goes.

    The gates have an Adam of their own, without weight decay, at the learning rate of the run. A gate that is zero still has a gradient and
    may come back, until the last event removes zeros physically and multiplies the rest into the weights: what is left is the plain
    method, its ranks the outcome. With a `budget`, xi is raised at each step to what leaves no more than b(t) units open, on AdaLoRA's
    cubic curve, which makes runs comparable.

    Without decay of the factors the penalty can be escaped: g falls and A grows. Keep weight decay on (0.1 in the release). Where a unit
    closes by one number already (the SVD form's l, NOLA's coefficients) the gate is redundant, and does no harm.

    Source: arXiv:2311.11696; rules from the authors' code: 8 units, alpha 16, learning rate 8e-4 to 1.2e-3, xi 3e-4 at every step, which
        is a `xi` of 0.4 times the learning rate here; there xi is then raised in stages (`xi_end` is one ramp). Its prox sets what is shrunk to
        zero below xi once more (`prox="reference"`).
    Args:
        budget: most units, or parameters, at the end; None leaves it to xi.
        xi: strength of the proximal step, times the learning rate.
        xi_end: what xi rises to, linearly between warm-up and the final phase; None keeps it.
        prox: "exact", or "reference" for the release's, whose dead zone is twice as wide.
        prox_scale: "lr", a true proximal gradient step, or "none": xi as it is, however small the learning rate becomes.
        l1: weight of sum |g| / (number of gates) in the loss, beside the proximal step; 10 in the release's script.
        gate_lr_ratio: learning rate of the gates over that of the run.
        unit, every, warmup, final, floor, seed: as in `Allocator`; warmup only delays `xi_end` and the budget.
    Raises:
        ValueError: for a negative strength or an unknown word.
    """

    source = "arXiv:2311.11696"
    exact = False

    def __init__(
        self,
        budget: int | None = None,
        xi: float = 0.4,
        xi_end: float | None = None,
        prox: Literal["exact", "reference"] = "exact",
        prox_scale: Literal["lr", "none"] = "lr",
        l1: float = 0.0,
        gate_lr_ratio: float = 1.0,
        unit: Literal["ranks", "parameters"] = "ranks",
        every: int = 10,
        warmup: int | float = 0.1,
        final: int | float = 0.1,
        floor: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, None, seed)
        if min(xi, xi if xi_end is None else xi_end, l1) < 0 or gate_lr_ratio <= 0:
            raise UserError(
                f"xi={xi}, xi_end={xi_end}, l1={l1}, gate_lr_ratio={gate_lr_ratio}: strengths are 0 or more, the ratio above 0."
            )
        if prox not in ("exact", "reference") or prox_scale not in ("lr", "none"):
            raise UserError(
                f"prox={prox!r}, prox_scale={prox_scale!r}; use 'exact' or 'reference', 'lr' or 'none'."
            )
        self.xi, self.xi_end, self.prox, self.prox_scale = xi, xi_end, prox, prox_scale
        self.l1, self.gate_lr_ratio = l1, gate_lr_ratio
        self._lr: float | None = None  # of the step that is being made; None where it is skipped

    @property
    def _gated(self) -> bool:
        """Whether the gates are there: until the last event."""
        return self.steps_done < self.phases.end or self._owed

    def attach(self, axes: Axes) -> None:
        if not self._gated:
            return
        for key, axis in axes.items():
            warm = any(bool(slot.tensor.any()) for slot in axis.closing())
            start = (
                torch.ones(len(axis))
                if warm
                else torch.randn(len(axis), generator=generator(self.seed, key, 0))
            )
            self.track(axis, "g", start.to(leaf(axis))).requires_grad_()
            axis.gate = partial(self.gate, axis)

    def gate(self, axis: RankAxis) -> Tensor:
        """The gates of an axis, (units,); where training starts from a fresh adapter N(0, 1), from a trained one 1."""
        return self.track(axis, "g", leaf(axis))

    def observe(self, axes: Axes) -> None:
        self._lr = self.optimizers[0].param_groups[0]["lr"] * self.gate_lr_ratio

    @torch.no_grad()
    def after_step(self, axes: Axes) -> None:
        lr, self._lr = self._lr, None
        if not self._tracked:
            return
        gates = {key: self.gate(axis) for key, axis in axes.items()}
        trained = {key: g for key, g in gates.items() if g.grad is not None}
        if lr is not None and trained:
            count = sum(map(len, gates.values()))
            grads = [
                g.grad + self.l1 / count * g.sign() for g in trained.values() if g.grad is not None
            ]
            first, second = (
                [self.track(axes[k], name, zeros(g)) for k, g in trained.items()] for name in "mv"
            )
            steps = self.track(
                next(iter(axes.values())), "steps", torch.zeros((), dtype=torch.int64), None
            )
            adam(
                [g.detach() for g in trained.values()], grads, first, second, int(steps.add_(1)), lr
            )
            self._shrink(gates, lr)
        for g in gates.values():
            g.grad = None

    def _shrink(self, gates: dict[str, Tensor], lr: float) -> None:
        progress = self.phases.progress(self.steps_done)
        xi = self.xi if self.xi_end is None else self.xi + (self.xi_end - self.xi) * progress
        xi *= lr if self.prox_scale == "lr" else 1.0
        if self.budget is not None:
            sizes = {key: g.detach().abs().cpu() for key, g in gates.items()}
            budget = cubic(self._start_total, self.budget, progress)
            xi = max(xi, threshold_for(sizes, self.cost(), budget, self.floor))
        for g in gates.values():
            g.copy_(soft_threshold(g, xi, self.prox == "reference"))

    def score(self, axis: RankAxis) -> Tensor:
        return self.gate(axis).detach().abs()

    def acts_at(self, step: int) -> bool:
        return step == self.phases.end

    def budget_at(self, step: int) -> int | None:
        return self.budget if step >= self.phases.end else None

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        if step < self.phases.end:
            return {}
        count = {
            key: max(int((values > 0).sum()), min(self.floor, len(values)))
            for key, values in scores.items()
        }
        plan = keep_best(scores, cost, min(budget, cost.total(count)), self.floor)
        for (
            key,
            values,
        ) in (
            scores.items()
        ):  # what the budget leaves over must not buy a cheap unit whose gate is zero
            change, units = plan.get(key), set(ranked(values)[: count[key]])
            keep = sorted(units.intersection(change.keep) if isinstance(change, Resize) else units)
            if len(keep) < len(values):
                plan[key] = Resize(tuple(keep))
        return plan

    def carried_out(self, plan: Plan, step: int) -> None:
        if step >= self.phases.end:
            for axis in self._axes.values():
                axis.fold()
            self._tracked.clear()
        else:  # for the record: nothing is closed in the model, a gate of zero may come back
            zero = {
                key: (self.gate(axis) == 0).nonzero().flatten().tolist()
                for key, axis in self._axes.items()
            }
            self.closed = {key: tuple(units) for key, units in zero.items() if units}
