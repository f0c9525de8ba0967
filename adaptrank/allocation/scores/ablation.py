"""Ablation: the loss without a unit, and with that unit alone; exact with cached prefixes, or to first order.

IS(u) = S(only u) - S(without u), S the negative loss (arXiv:2403.16187; the constant S(all) is dropped). Higher is kept: removing the
unit hurts, or it helps alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank.allocation.scores.gradient import IMPORTANCES, Axes, Importance, Run, Scores
from adaptrank.training.distributed import repeated_blocks

MAX_UNITS = 5000
"""Each of them costs two passes over the examples."""


def exact(axes: Axes, run: Run, cached: bool = True) -> Scores:
    """IS of every unit: two forward passes a unit. What comes before the block that a unit is in is computed once a batch.

    Args:
        axes: all of them.
        run: with the model, its examples and its loss.
        cached: False computes every pass whole; the result is the same.
    """
    gates = {
        key: torch.ones(len(axis), device=axis.closing()[0].tensor.device)
        for key, axis in axes.items()
    }
    result = {key: torch.zeros(len(axis), dtype=torch.float64) for key, axis in axes.items()}
    blocks = repeated_blocks(run.model) if cached else []
    known: list[nn.Module] = []
    replay: dict[str, int] = {}
    with torch.no_grad(), ExitStack() as stack:
        for key, axis in axes.items():
            stack.enter_context(axis.gated(gates[key]))  # changed in place, below
        for batch in run.examples:
            for rest in (1.0, 0.0):  # without the unit, and with it alone
                for gate in gates.values():
                    gate.fill_(rest)
                with _recorded(blocks) as (order, outputs):
                    clean = float(run.loss(batch))
                if order != known:  # once, unless a batch takes another way through the model
                    known, replay = order, _replayable(axes, run, batch, order, outputs, clean)
                for key, gate in gates.items():
                    for unit in range(len(gate)):
                        gate[unit] = 1.0 - rest
                        try:
                            with _replayed(order, outputs, replay.get(key, 0)):
                                loss = float(run.loss(batch))
                        finally:
                            gate[unit] = rest
                        result[key][unit] += loss if rest else -loss
    return {key: run.reduce(values / max(len(run.examples), 1)) for key, values in result.items()}


def first_order(axes: Axes, run: Run) -> Scores:
    """The same to first order in a gate on each unit: -dL/dg at g = 1 for `without`, -dL/dg at g = 0 for `only`; two backward passes.

    L(without u) ~ L - dL/dg_u at 1 and L(only u) ~ L(none) + dL/dg_u at 0, so IS(u) = L(without u) - L(only u) ~ -(dL/dg_u(1) + dL/dg_u(0)),
    constants dropped.
    """
    result: dict[str, Tensor] = {key: torch.zeros(()) for key in axes}
    for batch in run.examples:
        for value in (1.0, 0.0):
            gates = gates_at(axes, value)
            with torch.enable_grad(), ExitStack() as stack:
                for key, axis in axes.items():
                    stack.enter_context(axis.gated(gates[key]))
                grads = torch.autograd.grad(
                    run.loss(batch), list(gates.values()), allow_unused=True
                )
            for key, grad in zip(gates, grads, strict=True):
                result[key] = (
                    result[key] - (torch.zeros_like(gates[key]) if grad is None else grad).detach()
                )
    count = max(len(run.examples), 1)
    return {key: run.reduce(values / count) for key, values in result.items()}


def gates_at(axes: Axes, value: float) -> dict[str, Tensor]:
    """A leaf (units,) of this value for each axis, in the dtype of its closing factor."""
    closing = {key: axis.closing()[0].tensor for key, axis in axes.items()}
    return {
        key: torch.full(
            (len(axes[key]),), value, dtype=t.dtype, device=t.device, requires_grad=True
        )
        for key, t in closing.items()
    }


def too_many(axes: Axes) -> str:
    """Why exact ablation is not for these axes, in a sentence; empty where it is."""
    units = sum(map(len, axes.values()))
    if units <= MAX_UNITS:
        return ""
    return (
        f"importance='ablation' runs the model twice for each of {units} units, and takes at most {MAX_UNITS}; use "
        f"importance='ablation_first_order', two backward passes in all"
    )


def _replayable(
    axes: Axes,
    run: Run,
    batch: Any,
    order: Sequence[nn.Module],
    outputs: Mapping[nn.Module, Any],
    clean: float,
) -> dict[str, int]:
    """Axis -> how many blocks need not be computed for its units: those before the first that holds one of its layers.

    Each such prefix is tried without an ablation, and is used if the loss is that of the clean pass to the last bit. It is not where a block
    writes into what another returned, or leaves something behind for a later one beside what it returns. Where a block runs twice, nobody
    can tell which call comes before which, and none is used.
    """
    if len(order) != len(set(order)):
        return {}
    first = _first_blocks(axes, order)

    def same(upto: int) -> bool:
        try:
            with _replayed(order, outputs, upto):
                return float(run.loss(batch)) == clean
        except Exception:  # a later block missed what one of these leaves behind
            return False

    usable = [upto for upto in sorted(set(first.values())) if upto and same(upto)]
    return {key: max((u for u in usable if u <= upto), default=0) for key, upto in first.items()}


@contextmanager
def _replayed(
    blocks: Sequence[nn.Module], outputs: Mapping[nn.Module, Any], upto: int
) -> Iterator[None]:
    """The first `upto` blocks return what they returned in the clean pass, without computing it."""
    before = [
        (block, block.__dict__.get("forward")) for block in blocks[:upto]
    ]  # accelerate, too, hangs one there
    try:
        for block, _ in before:
            block.forward = partial(_given, outputs[block])
        yield
    finally:
        for block, own in before:
            block.__dict__.pop("forward", None)
            if own is not None:
                block.forward = own


def _given(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


@contextmanager
def _recorded(
    blocks: Sequence[nn.Module],
) -> Iterator[tuple[list[nn.Module], dict[nn.Module, Any]]]:
    """(blocks in the order in which they are called, {block: its output}) of the passes made inside."""
    order: list[nn.Module] = []
    outputs: dict[nn.Module, Any] = {}

    def record(block: nn.Module, args: Any, output: Any) -> None:
        order.append(block)
        outputs[block] = output

    handles = [block.register_forward_hook(record) for block in blocks]
    try:
        yield order, outputs
    finally:
        for handle in handles:
            handle.remove()


def _first_blocks(axes: Axes, blocks: Sequence[nn.Module]) -> dict[str, int]:
    """Axis -> the first of the blocks that holds one of its layers; 0 where one of them is in no block."""
    of: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            of.setdefault(id(module), index)
    return {
        key: min(of.get(id(layer), 0) for layer, _ in axis.members) for key, axis in axes.items()
    }


IMPORTANCES["ablation"] = Importance(exact, examples=1, refuses=too_many)
IMPORTANCES["ablation_first_order"] = Importance(first_order, examples=1)
