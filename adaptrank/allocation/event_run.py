"""The course of one event: score the units, plan, check the plan, carry it out, record it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptrank._collectives import first, from_first
from adaptrank.allocation import checks
from adaptrank.allocation.context import Run
from adaptrank.allocation.events import Apply, Event, Proposal, describe, summarize_scores
from adaptrank.allocation.state import TrackedTensors

if TYPE_CHECKING:
    from adaptrank.allocation.policy import Policy

UNBOUNDED = 1 << 62
"""Budget that a plan gets where none is enforced."""


@torch.no_grad()
def run_event(policy: "Policy[Any]", run: Run, state: TrackedTensors, apply: Apply) -> Event:
    """Score, plan, carry the plan out, and return the record.

    If a score is not a number the ranks stay, and `run.progress.deferred` is set. The next event
    makes up for it. After the last event every step tries again.

    Args:
        policy: the allocator.
        run: the run, at the step of the event.
        state: tracked tensors of the allocator.
        apply: carries a plan out.
    """
    step = run.steps_done
    budget = policy.budget_at(step)
    event: Event = {"step": step, "budget": budget, "unit": run.unit}
    # A score that runs the model is not asked in vain.
    idle = run.examples_needed > 0 and not policy.acts_at(step)
    scores = {} if idle else _average_scores(policy, run, state)
    values = torch.cat([torch.zeros(0), *scores.values()]).double()
    run.progress.deferred = bool(values.isnan().any())
    if run.progress.deferred:
        event["reason"] = "a score is not a number"
        event["skipped"] = event["reason"]
        return run.record(event)
    proposal = Proposal({}) if idle else _propose(policy, run, state, scores, budget)
    checks.check_plan(policy, run, proposal.plan, run.cost(), budget)
    event["scores"] = summarize_scores(values)
    units_before, parameters_before = sum(run.open_sizes().values()), run.open_parameters()
    event.update(policy.carry_out(state, proposal.plan, step, apply))
    units_after, parameters_after = sum(run.open_sizes().values()), run.open_parameters()
    event["reason"] = describe(event, budget, units_before, units_after)
    if parameters_before != parameters_after:
        event["reason"] += f", {parameters_before:,} -> {parameters_after:,} parameters"
    if proposal.remark:
        event["reason"] += f"; {proposal.remark}"
    return run.record(event)


def _average_scores(policy: "Policy[Any]", run: Run, state: TrackedTensors) -> dict[str, Tensor]:
    """Return the scores of all units, averaged over processes, on the CPU."""
    scores = policy.score_units(state, run.axes)
    return {key: run.reduce(values).detach().cpu() for key, values in scores.items()}


def _propose(
    policy: "Policy[Any]",
    run: Run,
    state: TrackedTensors,
    scores: Mapping[str, Tensor],
    budget: int | None,
) -> Proposal:
    """Return the plan of the first process."""
    proposal = Proposal({})
    if first():
        enforced = UNBOUNDED if budget is None else budget
        proposal = policy.propose(state, scores, run.cost(), enforced, run.steps_done)
    return from_first(proposal)
