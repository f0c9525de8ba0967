"""State of an allocator that trains a number for each unit."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptrank.allocation.context import Axes
from adaptrank.allocation.gates import adam, leaf
from adaptrank.allocation.scores.elements import zeros
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import RankAxis


class TrainedGates(TrackedTensors):
    """A trained number for each unit, with Adam moments of its own and without weight decay.

    Args:
        name: letter of the trained numbers in the paper.
        eps: eps of Adam.
        raw_eps: whether it is added before the bias of the second moment is corrected, see `adam`.
    """

    def __init__(self, name: str, eps: float = 1e-8, raw_eps: bool = False) -> None:
        super().__init__()
        self.name = name
        self.eps, self.raw_eps = eps, raw_eps

    def values(self, axis: RankAxis) -> Tensor:
        """Return the trained numbers of an axis, (units,); they start at zero."""
        return self.track(axis, self.name, leaf(axis))

    def with_gradient(self, axes: Axes) -> dict[str, Tensor]:
        """Return the gradient of each axis that took part in the step, {axis key: (units,)}."""
        gradients = {}
        for key, axis in axes.items():
            grad = self.values(axis).grad
            if grad is not None:
                gradients[key] = grad
        return gradients

    def adam_step(
        self, axes: Axes, gradients: Mapping[str, Tensor], learning_rates: Mapping[str, float]
    ) -> None:
        """Make a step of Adam on the axes that have a gradient, each at its learning rate."""
        values = [self.values(axes[key]).detach() for key in gradients]
        first = [self._moment(axes[key], "m") for key in gradients]
        second = [self._moment(axes[key], "v") for key in gradients]
        # The counter lies on the device, since a step without finite gradients is not counted.
        counter = values[0].new_zeros((), dtype=torch.int64)
        step = self.track(next(iter(axes.values())), "steps", counter, None).add_(1)
        rates = [learning_rates[key] for key in gradients]
        grads = list(gradients.values())
        adam(values, grads, first, second, step, rates, eps=self.eps, raw_eps=self.raw_eps)

    def clear_moments(self, axis: RankAxis, units: list[int]) -> None:
        """Set the Adam moments of some units to zero."""
        for name in ("m", "v"):
            self._moment(axis, name)[units] = 0

    def clear_gradients(self, axes: Axes) -> None:
        """Drop all gradients; without it they would add up over steps."""
        for axis in axes.values():
            self.values(axis).grad = None

    def _moment(self, axis: RankAxis, name: str) -> Tensor:
        return self.track(axis, name, zeros(self.values(axis)))
