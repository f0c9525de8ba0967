"""Second order in a gate on each unit: gradient and Hessian of the loss, and the greedy choice that they predict to hurt least.

With all gates at 1, discarding a set changes the loss by about Q(u) = -sum g_i u_i + 1/2 sum M_ij u_i u_j, u_i = 1 for what is discarded.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptrank.allocation.plans import Plan, Resize
from adaptrank.allocation.scores.ablation import gates_at
from adaptrank.allocation.scores.gradient import IMPORTANCES, Axes, Importance, Run, Scores
from adaptrank.axes import CostModel, natural

MAX_UNITS = 20_000
"""Their Hessian takes 3.2 GB in double precision."""

Estimator = Literal["fisher", "exact", "block"]


@dataclass(frozen=True)
class SecondOrder:
    """Gradient and Hessian of the loss with respect to gates.

    Args:
        units: (axis, unit) of each index.
        g: (n,), in double precision.
        blocks: (first index, matrix (k, k)) along the diagonal; outside of them the Hessian counts as zero.
    """

    units: list[tuple[str, int]]
    g: Tensor
    blocks: list[tuple[int, Tensor]]

    def diagonal(self) -> Tensor:
        """M_ii, (n,)."""
        return torch.cat([matrix.diagonal() for _, matrix in self.blocks])

    def change(self, discarded: Sequence[int]) -> float:
        """Q of a set: the predicted change of the loss."""
        u = torch.zeros_like(self.g)
        u[list(discarded)] = 1
        quadratic = sum(float(u[i : i + len(M)] @ M @ u[i : i + len(M)]) for i, M in self.blocks)
        return float(-self.g @ u) + quadratic / 2


def estimate(axes: Axes, run: Run, estimator: Estimator) -> SecondOrder:
    """Gradient and Hessian on the run's examples, the same on all processes.

    Args:
        axes: whose units.
        run: with examples and a loss.
        estimator: "fisher", the mean of gamma gamma^T over single examples, gamma the gradient of one example's loss: positive, no second
            backward pass. "exact", n products with the Hessian. "block", Fisher within each axis alone.
    """
    keys = sorted(axes, key=natural)
    units = [(key, unit) for key in keys for unit in range(len(axes[key]))]
    n, sizes = len(units), [len(axes[key]) for key in keys]
    spans = (
        [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
        if estimator == "block"
        else [(0, n)]
    )
    g, matrices, count = (
        torch.zeros(n, dtype=torch.float64),
        [torch.zeros(k, k, dtype=torch.float64) for _, k in spans],
        0,
    )
    for batch in run.examples:
        for part in [batch] if estimator == "exact" else examples(batch):
            gamma, hessian = _derivatives(
                {key: axes[key] for key in keys}, run, part, estimator == "exact"
            )
            g += gamma
            count += 1
            for (start, k), matrix in zip(spans, matrices, strict=True):
                own = gamma[start : start + k]
                matrix += torch.outer(own, own) if hessian is None else hessian
    total = float(run.reduce(torch.tensor(float(count), dtype=torch.float64)))
    blocks = [
        (start, run.reduce(matrix) / total)
        for (start, _), matrix in zip(spans, matrices, strict=True)
    ]
    return SecondOrder(
        units,
        run.reduce(g) / total,
        [(i, M + 1e-8 * torch.eye(len(M), dtype=M.dtype)) for i, M in blocks],
    )


def _derivatives(axes: Axes, run: Run, batch: Any, second: bool) -> tuple[Tensor, Tensor | None]:
    gates = gates_at(axes, 1.0)
    leaves = list(gates.values())
    # Fused attention has no second derivative.
    with torch.enable_grad(), ExitStack() as stack:
        if second:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for key, axis in axes.items():
            stack.enter_context(axis.gated(gates[key]))
        first = torch.autograd.grad(run.loss(batch), leaves, create_graph=second, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros_like(leaf) if grad is None else grad
                for leaf, grad in zip(leaves, first, strict=True)
            ]
        )
        rows = []
        for i in range(len(flat) if second else 0):
            row = (
                torch.autograd.grad(flat[i], leaves, retain_graph=True, allow_unused=True)
                if flat[i].requires_grad
                else [None] * len(leaves)
            )
            rows.append(
                torch.cat(
                    [
                        torch.zeros_like(x) if r is None else r
                        for x, r in zip(leaves, row, strict=True)
                    ]
                )
            )
    hessian = torch.stack(rows).double().cpu() if second else None
    return flat.detach().double().cpu(), None if hessian is None else (hessian + hessian.T) / 2


def examples(batch: Any) -> Iterator[Any]:
    """The single examples of a batch: of tensors, or mappings and sequences of them, that count examples first."""
    sizes = set(_lengths(batch))
    if len(sizes) != 1:
        yield batch  # nobody can tell what its examples are
        return
    for i in range(sizes.pop()):
        yield _only(batch, i)


def _lengths(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.dim():
            yield len(batch)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _lengths(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _lengths(value)


def _only(batch: Any, i: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[i : i + 1] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _only(value, i) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_only(value, i) for value in batch)
    return batch


# ---- the choice


def greedy(
    second: SecondOrder, cost: CostModel, budget: int, floor: int = 1, stop: bool = False
) -> tuple[list[int], bool]:
    """Indices to keep, and whether each gain at the start was positive, so that the guarantee of 1 - 1/e holds. Pure.

    The Hessian is projected first: M_ij -> max(M_ij, 0) off the diagonal, the nearest matrix with which the gain is submodular. Then
    one unit at a time, the one whose discarding would hurt most: gain_i = -g_i + M_ii / 2 + sum of M_ij over all others that are not kept.
    Gains only fall, so they are recomputed when they reach the top of a heap. Each axis gets its floor first. With unequal costs the same
    is done by gain over cost as well, and what is predicted to hurt less is returned.

    Args:
        second: gradient and Hessian.
        cost: in the unit of the budget.
        budget: total of what is kept.
        floor: least number of units an axis keeps.
        stop: keep no unit whose gain is not positive.
    """
    projected = []
    for start, M in second.blocks:
        P = M.clamp_min(0)
        P.diagonal().copy_(M.diagonal())
        projected.append((start, P))
    monotone = bool((-second.g + second.diagonal() / 2 >= -1e-12).all())
    sizes = {axis: 0 for axis, _ in second.units}
    priced = any(cost.marginal(axis, sizes | {axis: 1}) != 1 for axis in sizes)
    choices = [
        _greedy(second, projected, cost, budget, floor, stop, by_cost)
        for by_cost in ((False, True) if priced else (False,))
    ]
    everything = set(range(len(second.units)))
    return min(choices, key=lambda kept: second.change(sorted(everything - set(kept)))), monotone


def _greedy(
    second: SecondOrder,
    projected: list[tuple[int, Tensor]],
    cost: CostModel,
    budget: int,
    floor: int,
    stop: bool,
    by_cost: bool,
) -> list[int]:
    n = len(second.units)
    where = {start + i: (start, P) for start, P in projected for i in range(len(P))}
    diagonal = second.diagonal()
    # -g_i + M_ii / 2 + sum over j != i of M_ij, of which what is kept is subtracted as it is chosen.
    gains = (-second.g - diagonal / 2 + torch.cat([P.sum(1) for _, P in projected])).tolist()
    available = {axis: 0 for axis, _ in second.units}
    for axis, _ in second.units:
        available[axis] += 1
    floors = {axis: min(floor, size) for axis, size in available.items()}
    sizes, kept = dict.fromkeys(available, 0), []

    def add(i: int) -> None:
        kept.append(i)
        sizes[second.units[i][0]] += 1
        start, P = where[i]
        for j, value in enumerate(P[:, i - start].tolist()):
            if start + j != i:
                gains[start + j] -= value

    def value(i: int) -> float:
        price = max(cost.marginal(second.units[i][0], sizes), 1) if by_cost else 1
        gain = float(gains[i])
        return gain / price if gain >= 0 else gain * price

    def run(eligible: list[int], may: Any) -> None:
        heap = [(-value(i), i) for i in eligible]
        heapq.heapify(heap)
        while heap:
            stale, i = heapq.heappop(heap)
            if not may(i):
                continue
            if -value(i) > stale:
                heapq.heappush(heap, (-value(i), i))
                continue
            add(i)

    run(list(range(n)), lambda i: sizes[second.units[i][0]] < floors[second.units[i][0]])
    # What the floors of axes still to come need is there: every axis has its own by now.
    first = set(kept)
    rest = [i for i in range(n) if i not in first]

    def fits(i: int) -> bool:
        if stop and gains[i] <= 0:
            return False
        return cost.total(sizes) + cost.marginal(second.units[i][0], sizes) <= budget

    run(rest, fits)
    return kept


def as_plan(second: SecondOrder, kept: Sequence[int]) -> Plan:
    """A plan that keeps these indices."""
    units: dict[str, list[int]] = {axis: [] for axis, _ in second.units}
    total, stays = dict.fromkeys(units, 0), set(kept)
    for i, (axis, unit) in enumerate(second.units):
        total[axis] += 1
        if i in stays:
            units[axis].append(unit)
    return {
        axis: Resize(tuple(sorted(own))) for axis, own in units.items() if len(own) < total[axis]
    }


# ---- scores


def by_axis(second: SecondOrder, values: Tensor) -> Scores:
    """{axis: (units,)} of a value for each index."""
    found: dict[str, list[float]] = {}
    for (axis, _), value in zip(second.units, values.tolist(), strict=True):
        found.setdefault(axis, []).append(value)
    return {axis: torch.tensor(own, dtype=torch.float64) for axis, own in found.items()}


def alone(second: SecondOrder) -> Tensor:
    """-g_i + M_ii / 2, (n,): the predicted change of the loss when the unit alone is discarded."""
    return -second.g + second.diagonal() / 2


def _fisher(axes: Axes, run: Run) -> Scores:
    second = estimate(axes, run, "block")  # the same diagonal, in less memory
    return by_axis(second, alone(second))


def _exact(axes: Axes, run: Run) -> Scores:
    second = estimate(axes, run, "exact")
    return by_axis(second, alone(second))


def _block(axes: Axes, run: Run) -> Scores:
    second = estimate(axes, run, "block")
    others = torch.cat(
        [M.clamp_min(0).sum(1) - M.diagonal().clamp_min(0) for _, M in second.blocks]
    )
    return by_axis(second, alone(second) + others)


def explained_variance(axes: Axes, run: Run) -> Scores:
    """Share of each unit in its layer's change on the examples: E |U_u x|^2 over the sum of it over the units, (units,) each."""
    result = {}
    with torch.no_grad():
        inputs = _captured(axes, run)
        for key, axis in axes.items():
            total = torch.zeros(len(axis), dtype=torch.float64)
            gate = torch.zeros(len(axis), device=axis.closing()[0].tensor.device)
            for layer, args, kwargs in inputs[key]:
                with axis.gated(gate):  # changed in place, below
                    without = _tensor(layer(*args, **kwargs)).double()
                    for unit in range(len(axis)):
                        gate[unit] = 1
                        total[unit] += float(
                            (_tensor(layer(*args, **kwargs)).double() - without).square().sum()
                        )
                        gate[unit] = 0
            total = run.reduce(total)
            result[key] = total / total.sum().clamp_min(1e-300)
    return result


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _captured(axes: Axes, run: Run) -> dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    calls: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {key: [] for key in axes}

    def hook(key: str) -> Any:
        return lambda layer, args, kwargs: calls[key].append((layer, args, kwargs))

    handles = [
        layer.register_forward_pre_hook(hook(key), with_kwargs=True)
        for key, axis in axes.items()
        for layer, _ in axis.members
    ]
    try:
        for batch in run.examples:
            run.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def too_many(axes: Axes) -> str:
    """Why a whole Hessian is not for these axes, in a sentence; empty where it is."""
    units = sum(map(len, axes.values()))
    if units <= MAX_UNITS:
        return ""
    return f"the Hessian of {units} units is too large, {MAX_UNITS} are the most; take the one within each axis, 'block'"


IMPORTANCES["second_order"] = Importance(_fisher, examples=1)
IMPORTANCES["second_order_exact"] = Importance(_exact, examples=1, refuses=too_many)
IMPORTANCES["second_order_block"] = Importance(_block, examples=1)
IMPORTANCES["explained_variance"] = Importance(explained_variance, examples=1)
