"""Ablation scores: the loss without a unit, and with that unit alone.

IS(u) = S(only u) - S(without u), where S is the negative loss (arXiv:2403.16187, whose constant
S(all) is dropped). Higher is kept: removing the unit hurts, or the unit helps alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adaptrank.allocation.scores.importance import IMPORTANCES, Axes, Importance, Run, Scores
from adaptrank.allocation.scores.replay import Replay
from adaptrank.allocation.scores.virtual_gates import dense_grad, gated, gates_at
from adaptrank.training.distributed import repeated_blocks

MAX_UNITS = 5000
"""Most units for exact ablation, which needs two passes over the examples for each."""


def exact(axes: Axes, run: Run, cached: bool = True) -> Scores:
    """Return IS of every unit, by two forward passes for each.

    Blocks before the block of a unit are computed once for each batch.

    Args:
        axes: all axes of the model.
        run: model, examples and loss.
        cached: False computes every pass whole. The result is the same.
    """
    gates = {}
    for key, axis in axes.items():
        gates[key] = torch.ones(len(axis), device=axis.closing()[0].tensor.device)
    totals = {key: torch.zeros(len(axis), dtype=torch.float64) for key, axis in axes.items()}
    replay = Replay(axes, run, repeated_blocks(run.model) if cached else [])
    # The gates hang in the model and are changed in place below.
    with torch.no_grad(), gated(axes, gates):
        for batch in run.examples:
            # Others open: the loss without the unit. Others closed: the loss with it alone.
            for others, sign in ((1.0, 1), (0.0, -1)):
                for gate in gates.values():
                    gate.fill_(others)
                replay.record(batch)
                for key, gate in gates.items():
                    for unit in range(len(gate)):
                        with _set(gate, unit, 1.0 - others, others):
                            totals[key][unit] += sign * replay.loss(batch, key)
    count = max(len(run.examples), 1)
    return {key: run.reduce(total / count) for key, total in totals.items()}


@contextmanager
def _set(gate: Tensor, unit: int, value: float, restored: float) -> Iterator[None]:
    """Give the gate of one unit another value."""
    gate[unit] = value
    try:
        yield
    finally:
        gate[unit] = restored


def first_order(axes: Axes, run: Run) -> Scores:
    """Return IS to first order in a gate on each unit, by two backward passes.

    L(without u) ~ L - dL/dg_u at g = 1, and L(only u) ~ L(none) + dL/dg_u at g = 0. Therefore
    IS(u) = L(without u) - L(only u) ~ -(dL/dg_u(1) + dL/dg_u(0)), constants dropped.
    """
    totals: dict[str, Tensor] = {key: torch.zeros(()) for key in axes}
    for batch in run.examples:
        for value in (1.0, 0.0):
            gates = gates_at(axes, value)
            with torch.enable_grad(), gated(axes, gates):
                grads = dense_grad(run.loss(batch), list(gates.values()))
            for key, grad in zip(gates, grads, strict=True):
                totals[key] = totals[key] - grad.detach()
    count = max(len(run.examples), 1)
    return {key: run.reduce(total / count) for key, total in totals.items()}


def too_many(axes: Axes) -> str:
    """Return why exact ablation does not fit these axes, as a sentence, or "" if it fits."""
    units = sum(map(len, axes.values()))
    if units <= MAX_UNITS:
        return ""
    return (
        f"importance='ablation' runs the model twice for each of {units} units, and takes at most "
        f"{MAX_UNITS}. Use importance='ablation_first_order', two backward passes in all"
    )


IMPORTANCES["ablation"] = Importance(exact, examples=1, refuses=too_many)
IMPORTANCES["ablation_first_order"] = Importance(first_order, examples=1)
