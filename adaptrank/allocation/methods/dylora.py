"""DyLoRA: train all ranks at once, so that any prefix of the units is an adapter."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.plans import Plan, Resize
from adaptrank.allocation.scores.elements import Elements, elements
from adaptrank.allocation.scores.importance import Axes
from adaptrank.axes import RankAxis, generator


class DyLoRA(Allocator):
    """Draw b from 1 to r at each step, compute with the first b units alone, times r / b, and train the b-th, or the first b.

    So the multiplier is alpha / b. One b holds for all layers; an axis with fewer units takes all it has. Of a layer with several axes, k,
    each takes the k-th root of its r / b. Afterwards every b is an adapter of its own: `truncate` keeps the first b of each layer for
    good, and evaluation during the run uses `b_eval`. What a step leaves out keeps its values and its moments to the last bit, momentum
    included. A tensor between two axes trains, where `frozen`, what b units of both have and b - 1 have not.

    Source: arXiv:2210.07558; rules from the authors' code, which trains one unit a step (`frozen`), 8 units, alpha 16, learning rate 5e-4.
        It scales both factors by the root of r / b, which is the same product. The paper's default of `frozen` was not verified.
    Args:
        frozen: train the b-th unit only; False trains the first b.
        b_eval: units that evaluation uses; None is all.
        truncate: units to keep when training is over, of all axes, or {axis: units} for some of them; None keeps all.
        seed: of b.
    Raises:
        ValueError: if b_eval or truncate is below 1; at the start, if truncate names an axis that the model has not.
    """

    source = "arXiv:2210.07558"
    requires = frozenset({"ordered"})
    exclusive = True
    moves = False

    def __init__(
        self,
        frozen: bool = True,
        b_eval: int | None = None,
        truncate: int | dict[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(warmup=0, final=0, seed=seed)
        least = min(truncate.values(), default=1) if isinstance(truncate, dict) else truncate
        if (b_eval is not None and b_eval < 1) or (least is not None and least < 1):
            raise UserError(
                f"b_eval={b_eval}, truncate={truncate}: a prefix has at least one unit."
            )
        self.frozen, self.b_eval, self.truncate = frozen, b_eval, truncate
        self.b = 0
        """Of the step that is being made."""
        self._kept: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # (tensor, its value before the step, what the step may change)

    def begin(self, sizes: Mapping[str, int]) -> None:
        for key in self.truncate if isinstance(self.truncate, dict) else ():
            if key not in sizes:
                close = difflib.get_close_matches(key, sizes, 1, 0) or list(sizes)[:1]
                raise UserError(
                    f"truncate names {key!r}, which is no axis of this model; use one such as {close[0]!r}."
                )

    def attach(self, axes: Axes) -> None:
        for axis in axes.values():
            for layer, name in axis.members:

                def hang(layer: Any, args: Any, axis: RankAxis = axis, name: str = name) -> None:
                    layer.gates = {
                        **layer.gates,
                        name: self.gate(axis, self.b if layer.training else self.b_eval),
                    }

                def take_away(layer: Any, args: Any, output: Any, name: str = name) -> None:
                    layer.gates = {key: value for key, value in layer.gates.items() if key != name}

                # Within a forward pass only: a file or a merge in the midst of training holds all units.
                self.handles.append(layer.register_forward_pre_hook(hang))
                self.handles.append(layer.register_forward_hook(take_away, always_call=True))

    @staticmethod
    def gate(axis: RankAxis, b: int | None) -> Tensor:
        """(units,): r / b for the first b, 0 for the rest; a root of it where a layer has several axes, which multiply."""
        size, several = len(axis), max(len(layer.axes) for layer, _ in axis.members)
        b = size if b is None else min(b, size)
        first = torch.arange(size, device=axis.closing()[0].tensor.device) < b
        return first * float((size / b) ** (1 / several))

    def before_forward(self, axes: Axes) -> None:
        self.b = self.drawn(self.steps_done + 1, max(map(len, axes.values())))

    def drawn(self, step: int, most: int) -> int:
        """b of a step: uniform from 1 to `most`, the same on every process and after a resume."""
        return 1 + int(torch.randint(most, (), generator=generator(self.seed, "prefix", step)))

    def observe(self, axes: Axes) -> None:
        self._kept = []
        for element in elements(axes):
            b = min(self.b, max(len(axes[key]) for key, _ in element.where))
            mask = _prefix(element, b)
            if self.frozen:
                mask &= ~_prefix(element, b - 1)
            if element.tensor.grad is not None:
                element.tensor.grad.mul_(mask)
            self._kept.append((element.tensor, element.tensor.detach().clone(), mask))
            self._kept += [(value, value.clone(), mask) for value in self._moments(element.tensor)]
        self._known = {id(tensor) for tensor, _, _ in self._kept}

    def _moments(self, tensor: Tensor) -> list[Tensor]:
        states = [optimizer.state.get(tensor, {}) for optimizer in self.optimizers]
        return [
            v
            for state in states
            for v in state.values()
            if isinstance(v, Tensor) and v.shape == tensor.shape
        ]

    def after_step(self, axes: Axes) -> None:
        for tensor, before, mask in self._kept:
            tensor.data.copy_(torch.where(mask, tensor.detach(), before))
            if isinstance(
                tensor, nn.Parameter
            ):  # the first step makes the moments: of what it left out they are zero
                for moment in self._moments(tensor):
                    if id(moment) not in self._known:
                        moment.mul_(mask)
        self._kept = []
        if self.truncate is not None and self.steps_done == self.phases.total:
            self._truncate(axes, self.truncate)

    def _truncate(self, axes: Axes, b: int | dict[str, int]) -> None:
        kept = dict.fromkeys(axes, b) if isinstance(b, int) else b
        for key, first in kept.items():
            axes[key].gate = self.gate(axes[key], first)
            axes[key].fold()
        plan: Plan = {
            key: Resize(tuple(range(first)))
            for key, first in kept.items()
            if len(axes[key]) > first
        }
        event = self.apply(plan, self.steps_done, self.optimizers)
        reason = (
            f"the first {b} units of each axis"
            if isinstance(b, int)
            else "the first units of each axis, as asked"
        )
        event.update({"step": self.steps_done, "reason": reason, "unit": self.unit})
        self._record(event)


def _prefix(element: Elements, b: int) -> Tensor:
    """Which entries of a tensor belong to the first b units of each of its axes, a mask of its shape."""
    mask = torch.ones_like(element.tensor, dtype=torch.bool)
    for _, dim in element.where:
        shape = [1] * element.tensor.dim()
        shape[dim] = -1
        mask &= (torch.arange(element.tensor.shape[dim], device=mask.device) < b).view(shape)
    return mask
