"""Second-order scores: gradient and Hessian of the loss in a gate on each unit.

With all gates at 1, discarding a set of units changes the loss by about
Q(u) = -sum g_i u_i + 1/2 sum M_ij u_i u_j, where u_i = 1 for discarded units.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptrank.allocation.scores.importance import IMPORTANCES, Axes, Importance, Run, Scores
from adaptrank.allocation.scores.single_examples import examples
from adaptrank.allocation.scores.virtual_gates import dense_grad, gated, gates_at
from adaptrank.axes import natural

MAX_UNITS = 20_000
"""Most units for a whole Hessian, which then takes 3.2 GB in double precision."""

JITTER = 1e-8
"""Added to the diagonal of the Hessian."""

Estimator = Literal["fisher", "exact", "block"]


@dataclass(frozen=True)
class SecondOrder:
    """Gradient and Hessian of the loss with respect to gates, in double precision.

    Args:
        units: (axis, unit) of each index.
        g: gradient, (n,).
        blocks: (first index, matrix (k, k)) along the diagonal. The Hessian counts as zero
            elsewhere.
        empty: axes without units, which have no index.
    """

    units: list[tuple[str, int]]
    g: Tensor
    blocks: list[tuple[int, Tensor]]
    empty: tuple[str, ...] = ()

    def diagonal(self) -> Tensor:
        """Return M_ii, (n,)."""
        return torch.cat([M.diagonal() for _, M in self.blocks])

    def change(self, discarded: Sequence[int]) -> float:
        """Return Q of a set of indices, the predicted change of the loss."""
        u = torch.zeros_like(self.g)
        u[list(discarded)] = 1
        quadratic = 0.0
        for start, M in self.blocks:
            part = u[start : start + len(M)]
            quadratic += float(part @ M @ part)
        return float(-self.g @ u) + quadratic / 2


# ---- estimates


def estimate(axes: Axes, run: Run, estimator: Estimator) -> SecondOrder:
    """Return gradient and Hessian on the examples of the run, the same on all processes.

    Args:
        axes: axes whose units have gates.
        run: run with examples and a loss.
        estimator: "fisher" is the mean of gamma gamma^T over single examples, where gamma is the
            gradient of the loss of one example. It is positive semidefinite and needs no second
            backward pass. "exact" takes n products with the Hessian. "block" is Fisher within
            each axis alone.
    """
    axes = {key: axes[key] for key in sorted(axes, key=natural)}
    units: list[tuple[str, int]] = []
    for key, axis in axes.items():
        units += [(key, unit) for unit in range(len(axis))]
    spans = _spans(axes, split=estimator == "block")

    g = torch.zeros(len(units), dtype=torch.float64)
    matrices = [torch.zeros(size, size, dtype=torch.float64) for _, size in spans]
    count = 0
    for part in _parts(run.examples, estimator):
        gradient, hessian = _derivatives(axes, run, part, second=estimator == "exact")
        g += gradient
        count += 1
        for (start, size), matrix in zip(spans, matrices, strict=True):
            if hessian is None:
                gamma = gradient[start : start + size]
                matrix += torch.outer(gamma, gamma)
            else:
                matrix += hessian

    total = float(run.reduce(torch.tensor(float(count), dtype=torch.float64)))
    blocks = []
    for (start, size), matrix in zip(spans, matrices, strict=True):
        mean = run.reduce(matrix) / total
        blocks.append((start, mean + JITTER * torch.eye(size, dtype=mean.dtype)))
    empty = tuple(key for key, axis in axes.items() if not len(axis))
    return SecondOrder(units, run.reduce(g) / total, blocks, empty)


def _spans(axes: Axes, split: bool) -> list[tuple[int, int]]:
    """Return (first index, length) of each block of the Hessian, one in all or one an axis."""
    spans = []
    start = 0
    for axis in axes.values():
        spans.append((start, len(axis)))
        start += len(axis)
    return spans if split else [(0, start)]


def _parts(batches: Iterable[Any], estimator: Estimator) -> Iterator[Any]:
    """Yield what one gradient is taken of: whole batches for "exact", else single examples."""
    for batch in batches:
        if estimator == "exact":
            yield batch
        else:
            yield from examples(batch)


def _derivatives(axes: Axes, run: Run, batch: Any, second: bool) -> tuple[Tensor, Tensor | None]:
    """Return gradient (n,) and, with `second`, Hessian (n, n) in gates at 1, on the CPU."""
    gates = gates_at(axes, 1.0)
    leaves = list(gates.values())
    with torch.enable_grad(), gated(axes, gates):
        if not second:
            gradient = torch.cat(dense_grad(run.loss(batch), leaves))
            return gradient.detach().double().cpu(), None
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            gradient = torch.cat(dense_grad(run.loss(batch), leaves, create_graph=True))
            rows = [_row_of_hessian(gradient[i], leaves) for i in range(len(gradient))]
    hessian = torch.stack(rows).double().cpu()
    return gradient.detach().double().cpu(), (hessian + hessian.T) / 2


def _row_of_hessian(entry: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Return the derivative of one entry of the gradient in all gates, (n,)."""
    if not entry.requires_grad:
        return torch.cat([torch.zeros_like(leaf) for leaf in leaves])
    return torch.cat(dense_grad(entry, leaves, keep_graph=True))


# ---- scores


def by_axis(second: SecondOrder, values: Tensor) -> Scores:
    """Return {axis: (units,)} of a value for each index."""
    of_axis: dict[str, list[float]] = {axis: [] for axis in second.empty}
    for (axis, _), value in zip(second.units, values.tolist(), strict=True):
        of_axis.setdefault(axis, []).append(value)
    return {axis: torch.tensor(units, dtype=torch.float64) for axis, units in of_axis.items()}


def alone(second: SecondOrder) -> Tensor:
    """Return -g_i + M_ii / 2, (n,): the change of the loss if the unit alone is discarded."""
    return -second.g + second.diagonal() / 2


def _fisher(axes: Axes, run: Run) -> Scores:
    # The diagonal of "block" is that of "fisher", in less memory.
    second = estimate(axes, run, "block")
    return by_axis(second, alone(second))


def _exact(axes: Axes, run: Run) -> Scores:
    second = estimate(axes, run, "exact")
    return by_axis(second, alone(second))


def _block(axes: Axes, run: Run) -> Scores:
    second = estimate(axes, run, "block")
    interactions = []
    for _, M in second.blocks:
        interactions.append(M.clamp_min(0).sum(1) - M.diagonal().clamp_min(0))
    return by_axis(second, alone(second) + torch.cat(interactions))


def too_many(axes: Axes) -> str:
    """Return why a whole Hessian does not fit these axes, as a sentence, or "" if it fits."""
    units = sum(map(len, axes.values()))
    if units <= MAX_UNITS:
        return ""
    return (
        f"the Hessian of {units} units is too large, {MAX_UNITS} are the most. Take the one within "
        f"each axis, 'block'"
    )


IMPORTANCES["second_order"] = Importance(_fisher, examples=1)
IMPORTANCES["second_order_exact"] = Importance(_exact, examples=1, refuses=too_many)
IMPORTANCES["second_order_block"] = Importance(_block, examples=1)
