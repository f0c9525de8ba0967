"""DyLoRA: train all ranks at once, so that any prefix of the units is an adapter."""

from typing import Any

import torch
from torch import Tensor, nn

from adaptrank.allocators.base import Allocator
from adaptrank.allocators.plans import Plan, Resize
from adaptrank.allocators.scores import Axes, elements
from adaptrank.axes import RankAxis, generator


class DyLoRA(Allocator):
    """Draw b from 1 to r at each step, compute with the first b units alone, times r / b, and train the b-th, or the first b.

    So the multiplier is alpha / b. One b holds for all layers; an axis with fewer units takes all it has. Afterwards every b is an adapter of
    its own: `truncate` keeps the first b of each layer for good, and evaluation during the run uses `b_eval`. Units that a step
    leaves out keep their values and their moments to the last bit, momentum included.

    Source: arXiv:2210.07558; rules from the authors' code, which trains one unit a step (`frozen`), 8 units, alpha 16, learning rate 5e-4.
        It scales both factors by the root of r / b, which is the same product. The paper's default of `frozen` was not verified.
    Args:
        frozen: train the b-th unit only; False trains the first b.
        b_eval: units that evaluation uses; None is all.
        truncate: units to keep when training is over; None keeps all.
        seed: of b.
    Raises:
        ValueError: if b_eval or truncate is below 1.
    """

    source = "arXiv:2210.07558"
    requires = frozenset({"ordered"})
    exclusive = True
    moves = False

    def __init__(
        self, frozen: bool = True, b_eval: int | None = None, truncate: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(warmup=0, final=0, seed=seed)
        if (b_eval is not None and b_eval < 1) or (truncate is not None and truncate < 1):
            raise ValueError(f"b_eval={b_eval}, truncate={truncate}: a prefix has at least one unit.")
        self.frozen, self.b_eval, self.truncate = frozen, b_eval, truncate
        self.b = 0
        """Of the step that is being made."""
        self._kept: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # (tensor, its value before the step, what the step may change)

    def attach(self, axes: Axes) -> None:
        for axis in axes.values():
            for layer, name in axis.members:

                def hang(layer: Any, args: Any, axis: RankAxis = axis, name: str = name) -> None:
                    layer.gates = {**layer.gates, name: self.gate(axis, self.b if layer.training else self.b_eval)}

                def take_away(layer: Any, args: Any, output: Any, name: str = name) -> None:
                    layer.gates = {key: value for key, value in layer.gates.items() if key != name}

                # Within a forward pass only: a file or a merge in the midst of training holds all units.
                self.handles.append(layer.register_forward_pre_hook(hang))
                self.handles.append(layer.register_forward_hook(take_away, always_call=True))

    @staticmethod
    def gate(axis: RankAxis, b: int | None) -> Tensor:
        """(units,): r / b for the first b, 0 for the rest."""
        size = len(axis)
        b = size if b is None else min(b, size)
        units = torch.arange(size, device=axis.closing()[0].tensor.device)
        return (units < b) * (size / b)

    def before_forward(self, axes: Axes) -> None:
        self.b = self.drawn(self.steps_done + 1, max(map(len, axes.values())))

    def drawn(self, step: int, most: int) -> int:
        """b of a step: uniform from 1 to `most`, the same on every process and after a resume."""
        return 1 + int(torch.randint(most, (), generator=generator(self.seed, "prefix", step)))

    def observe(self, axes: Axes) -> None:
        self._kept = []
        active = {}
        for key, axis in axes.items():
            b, units = min(self.b, len(axis)), torch.arange(len(axis), device=axis.closing()[0].tensor.device)
            active[key] = units == b - 1 if self.frozen else units < b
        for element in elements(axes):
            mask = torch.ones_like(element.tensor, dtype=torch.bool)
            for key, dim in element.where:
                shape = [1] * element.tensor.dim()
                shape[dim] = -1
                mask &= active[key].view(shape)
            if element.tensor.grad is not None:
                element.tensor.grad.mul_(mask)
            self._kept.append((element.tensor, element.tensor.detach().clone(), mask))
            self._kept += [(value, value.clone(), mask) for value in self._moments(element.tensor)]
        self._known = {id(tensor) for tensor, _, _ in self._kept}

    def _moments(self, tensor: Tensor) -> list[Tensor]:
        states = [optimizer.state.get(tensor, {}) for optimizer in self.optimizers]
        return [v for state in states for v in state.values() if isinstance(v, Tensor) and v.shape == tensor.shape]

    def after_step(self, axes: Axes) -> None:
        for tensor, before, mask in self._kept:
            tensor.data.copy_(torch.where(mask, tensor.detach(), before))
            if isinstance(tensor, nn.Parameter):  # the first step makes the moments: of what it left out they are zero
                for moment in self._moments(tensor):
                    if id(moment) not in self._known:
                        moment.mul_(mask)
        self._kept = []
        if self.truncate is not None and self.steps_done == self.phases.total:
            self._truncate(axes, self.truncate)

    def _truncate(self, axes: Axes, b: int) -> None:
        for axis in axes.values():
            axis.gate = self.gate(axis, b)
            axis.fold()
        plan: Plan = {key: Resize(tuple(range(b))) for key, axis in axes.items() if len(axis) > b}
        event = self.apply(plan, self.steps_done, self.optimizers)
        event.update({"step": self.steps_done, "reason": f"the first {b} units of each axis", "unit": self.unit})
        self._record(event)
