"""Score: the share of each unit in the change that its layer makes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank.allocation.scores.importance import IMPORTANCES, Axes, Importance, Run, Scores
from adaptrank.axes import RankAxis


@dataclass(frozen=True)
class _Call:
    """One call of a layer, which can be made again."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def output(self) -> Tensor:
        output = self.layer(*self.args, **self.kwargs)
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        return tensor.double()


def explained_variance(axes: Axes, run: Run) -> Scores:
    """Return E |U_u x|^2 of each unit over its sum over the units of the axis, (units,) each."""
    scores = {}
    with torch.no_grad():
        calls = _record_calls(axes, run)
        for key, axis in axes.items():
            variance = run.reduce(_unit_variances(axis, calls[key]))
            scores[key] = variance / variance.sum().clamp_min(1e-300)
    return scores


def _unit_variances(axis: RankAxis, calls: list[_Call]) -> Tensor:
    """Return the sum of squares that each unit alone adds to the outputs, (units,)."""
    variance = torch.zeros(len(axis), dtype=torch.float64)
    gate = torch.zeros(len(axis), device=axis.closing()[0].tensor.device)
    for call in calls:
        # The gate hangs in the layer and is changed in place.
        with axis.gated(gate):
            without = call.output()
            for unit in range(len(axis)):
                gate[unit] = 1
                variance[unit] += float((call.output() - without).square().sum())
                gate[unit] = 0
    return variance


def _record_calls(axes: Axes, run: Run) -> dict[str, list[_Call]]:
    """Return axis -> calls of its layers on the examples of the run."""
    calls: dict[str, list[_Call]] = {key: [] for key in axes}

    def hook(key: str) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[key].append(_Call(layer, args, kwargs))

        return record

    handles = []
    for key, axis in axes.items():
        for layer, _ in axis.members:
            handles.append(layer.register_forward_pre_hook(hook(key), with_kwargs=True))
    try:
        for batch in run.examples:
            run.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


IMPORTANCES["explained_variance"] = Importance(explained_variance, examples=1)
