"""SoRA: a trained gate on each unit, and a proximal step that sets small gates to exactly zero."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation.budget import floor_of
from adaptrank.allocation.checks import smallest_adapter
from adaptrank.allocation.context import Axes
from adaptrank.allocation.events import Event, Proposal
from adaptrank.allocation.gates import leaf, soft_threshold, threshold_for
from adaptrank.allocation.plans import Plan, Resize, Scores, keep_best, ranked
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.schedules import cubic
from adaptrank.allocation.trained_gates import TrainedGates
from adaptrank.axes import CostModel, RankAxis, generator


class SoRA(Policy[TrainedGates]):
    """Train a gate g on each unit, shrink it after each step, and prune units whose gate is zero.

    The proximal step is g <- sign(g) max(|g| - xi, 0). The gates have an Adam of their own, without
    weight decay. The gates of an axis follow the learning rate of the parameter group that holds
    its closing factor (B of LoRA), at its place in the schedule. A gate that is zero still has a
    gradient, and may come back. The last event removes units with a zero gate physically, and
    multiplies the other gates into the weights. What is left is the plain method, and its ranks are
    the outcome. With a `budget`, xi is raised at each step to the value that leaves at most b(t)
    units open, on AdaLoRA's cubic curve. That makes runs comparable. Gates of layers that took no
    part in a step are shrunk by that value alone.

    A matrix whose gates are all zero loses all of its units. If all gates of the model are zero at
    the last event, one unit stays, so that the adapter can be trained on.

    Without decay of the factors the penalty can be escaped: g falls and A grows. Keep weight decay
    on (0.1 in the release). Where a unit closes by one number already (l of the SVD form, the
    coefficients of NOLA) the gate is redundant, and does no harm.

    Source: arXiv:2311.11696; rules from the authors' code: 8 units, alpha 16, learning rate 8e-4 to
    1.2e-3, xi 3e-4 at every step, which is a `xi` of 0.4 times the learning rate here. There xi is
    then raised in stages (`xi_end` is one ramp). Its proximal operator sets shrunk values below xi
    to zero once more (`prox="reference"`). Its Adam is that of transformers, with an eps of 1e-6
    that is added before the bias correction, and so is the Adam here.

    Args:
        budget: most units, or parameters, at the end; None leaves it to xi.
        xi: strength of the proximal step, times the learning rate.
        xi_end: value that xi rises to, linearly between warm-up and the final phase; None keeps xi.
        prox: "exact", or "reference" for the operator of the release, whose dead zone is twice as
            wide.
        prox_scale: "lr", a true proximal gradient step, or "none": xi as it is, however small the
            learning rate becomes.
        l1: weight of sum |g| / (number of gates) in the loss, beside the proximal step; 10 in the
            script of the release.
        gate_lr_ratio: learning rate of the gates of an axis over that of its closing factor.
        floor: smallest number of units of an axis; 0 as in the authors' code, which keeps the
            units whose gate is not zero.
        unit, every, warmup, final, seed: as in `Policy`; warmup only delays `xi_end` and the
            budget.
    Raises:
        ValueError: for a negative strength or an unknown word.
    """

    source = "arXiv:2311.11696"
    exact = False
    hangs_gates = True

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
        floor: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, unit, every, warmup, final, floor, None, seed)
        strengths = [xi, l1] if xi_end is None else [xi, xi_end, l1]
        if min(strengths) < 0 or gate_lr_ratio <= 0:
            raise UserError(
                f"xi={xi}, xi_end={xi_end}, l1={l1}, gate_lr_ratio={gate_lr_ratio}: strengths are "
                f"0 or more, the ratio above 0."
            )
        if prox not in ("exact", "reference") or prox_scale not in ("lr", "none"):
            raise UserError(
                f"prox={prox!r}, prox_scale={prox_scale!r}; use 'exact' or 'reference', 'lr' or "
                f"'none'."
            )
        self.xi, self.xi_end, self.prox, self.prox_scale = xi, xi_end, prox, prox_scale
        self.l1, self.gate_lr_ratio = l1, gate_lr_ratio

    def init_state(self, axes: Axes) -> TrainedGates:
        return TrainedGates("g", eps=1e-6, raw_eps=True)

    def install(self, state: TrainedGates, axes: Axes) -> None:
        """Multiply every unit by its gate: N(0, 1) on a fresh adapter, 1 on a trained one."""
        if not self.run.moves_left:
            return
        for axis in axes.values():
            state.track(axis, "g", self._start_of_gates(axis)).requires_grad_()
            axis.gate = partial(state.values, axis)

    def _start_of_gates(self, axis: RankAxis) -> Tensor:
        is_trained = any(bool(slot.tensor.any()) for slot in axis.closing())
        if is_trained:
            start = torch.ones(len(axis))
        else:
            start = torch.randn(len(axis), generator=generator(self.seed, axis.key, 0))
        return start.to(leaf(axis))

    def update(self, state: TrainedGates, axes: Axes) -> None:
        """Train the gates, and shrink them. No other tensor of the step depends on them."""
        gradients = state.with_gradient(axes)
        if not gradients:
            return
        gates = {key: state.values(axis).detach() for key, axis in axes.items()}
        count = sum(map(len, gates.values()))
        penalized = {
            key: grad + self.l1 / count * gates[key].sign() for key, grad in gradients.items()
        }
        rates = self.run.learning_rates(axes)
        rates = {key: rate * self.gate_lr_ratio for key, rate in rates.items()}
        state.adam_step(axes, penalized, rates)
        trained_rates = {key: rates[key] for key in gradients}
        thresholds = self._thresholds(gates, trained_rates, self.run.steps_done + 1)
        for key, gate in gates.items():
            gate.copy_(soft_threshold(gate, thresholds[key], self.prox == "reference"))

    def _thresholds(
        self, gates: dict[str, Tensor], rates: dict[str, float], step: int
    ) -> dict[str, float] | dict[str, Tensor]:
        """Return the threshold of each axis: its xi, raised to what the budget of the step needs.

        Args:
            gates: axis key -> gates.
            rates: axis key -> learning rate of the gates, of the axes that took part in the step.
            step: optimizer step.
        """
        progress = self.run.phases.progress(step)
        xi = self.xi
        if self.xi_end is not None:
            xi = self.xi + (self.xi_end - self.xi) * progress
        thresholds = dict.fromkeys(gates, 0.0)
        for key, rate in rates.items():
            thresholds[key] = xi * rate if self.prox_scale == "lr" else xi
        if self.budget is None:
            return thresholds
        magnitudes = {key: gate.abs() for key, gate in gates.items()}
        budget = cubic(self.run.start_total, self.budget, progress)
        shared = threshold_for(magnitudes, self.run.cost(), budget, self.floors(), thresholds)
        return {key: shared.clamp_min(threshold) for key, threshold in thresholds.items()}

    def finish_step(self, state: TrainedGates, axes: Axes) -> None:
        if state:
            state.clear_gradients(axes)

    def score_units(self, state: TrainedGates, axes: Axes) -> Scores:
        return {key: state.values(axis).detach().abs() for key, axis in axes.items()}

    def budget_at(self, step: int) -> int | None:
        return self.budget if step >= self.run.phases.end else None

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        if not self.acts_at(step):
            return {}
        count, floors = {}, self.floors()
        for key, values in scores.items():
            count[key] = max(int((values > 0).sum()), min(floor_of(floors, key), len(values)))
        if not any(count.values()):
            return self._keep_one()
        plan = keep_best(scores, cost, min(budget, cost.total(count)), floors)
        # What the budget leaves over must not buy a cheap unit whose gate is zero.
        for key, values in scores.items():
            open_units = set(ranked(values)[: count[key]])
            change = plan.get(key)
            if isinstance(change, Resize):
                open_units &= set(change.keep)
            if len(open_units) < len(values):
                plan[key] = Resize(tuple(sorted(open_units)))
        return plan

    def propose(
        self, state: TrainedGates, scores: Scores, cost: CostModel, budget: int, step: int
    ) -> Proposal:
        plan = self.plan(scores, cost, budget, step)
        if self.acts_at(step) and not any(bool(values.any()) for values in scores.values()):
            return Proposal(plan, "every gate is zero, so lower `xi`")
        return Proposal(plan)

    def _keep_one(self) -> Plan:
        """Return a plan that leaves the cheapest adapter which changes anything."""
        smallest = smallest_adapter(self.run)
        assert smallest is not None, "gates do not change sizes"
        sizes = self.run.sizes()
        return {
            key: Resize(tuple(range(size))) for key, size in smallest.items() if size < sizes[key]
        }

    def acts_at(self, step: int) -> bool:
        return step >= self.run.phases.end

    def carry_out(
        self, state: TrainedGates, plan: Plan, step: int, apply: Callable[[Plan, int], Event]
    ) -> Event:
        """Make the gates final at the last event; before it only note which gates are zero."""
        done = apply(plan, step)
        axes = self.run.axes
        if self.acts_at(step):
            for axis in axes.values():
                axis.fold(self.run.optimizers)
            state.clear()
        else:
            # For the record: nothing is closed in the model, and a gate of zero may come back.
            zero = {
                key: (state.values(axis) == 0).nonzero().flatten().tolist()
                for key, axis in axes.items()
            }
            self.run.progress.closed = {key: tuple(units) for key, units in zero.items() if units}
        return done
