"""DyLoRA: train all ranks at once, so that any prefix of the units is an adapter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError, nearest
from adaptrank.allocation.context import Axes
from adaptrank.allocation.gates import leaf
from adaptrank.allocation.plans import Plan, Resize
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.scores.elements import Elements, elements
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import RankAxis, Role, generator, states_of
from adaptrank.parameterizations import Parameterization


@dataclass(frozen=True)
class Untouched:
    """A tensor that an optimizer step may change only where `mask` is True.

    Args:
        tensor: parameter, or moment of it.
        value: its value before the step.
        mask: entries that the step may change.
    """

    tensor: Tensor
    value: Tensor
    mask: Tensor

    def restore(self) -> None:
        """Give all other entries their value from before the step."""
        self.tensor.data.copy_(torch.where(self.mask, self.tensor.detach(), self.value))


class PrefixState(TrackedTensors):
    """The prefix of the present optimizer step, and the values that the step must not change.

    Both are functions of the step, so that no checkpoint has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.b = 0
        self.untouched: list[Untouched] = []


class DyLoRA(Policy[PrefixState]):
    """Draw b from 1 to r at each step, compute with the first b units alone, and train the b-th.

    The output of the first b units is multiplied by r / b, so that the multiplier is alpha / b. One
    b holds for all layers; an axis with fewer units takes all it has. In a layer with several axes,
    k, each takes the k-th root of its r / b. Afterwards every b is an adapter of its own:
    `truncate` keeps the first b units of each layer for good, and evaluation during the run uses
    `b_eval`. With `frozen`, the entries of a tensor between two axes train that b units of both
    axes have and b - 1 units have not.

    As in the release, entries that a step leaves out have a gradient of zero, and the optimizer
    steps them all the same: momentum moves them, their moments decay, and so does their weight.
    With `rule="drawn"` they keep their values and their moments to the last bit.

    Source: arXiv:2210.07558; rules from the authors' code, which trains one unit a step (`frozen`),
    8 units, alpha 16, learning rate 5e-4. It scales both factors by the root of r / b, which is the
    same product. The paper's default of `frozen` was not verified.

    Args:
        rule: "published", or "drawn" for a step that changes the drawn units only.
        frozen: train the b-th unit only; False trains the first b.
        b_eval: units that evaluation uses; None is all.
        truncate: units to keep when training is over, of all axes, or {axis: units} for some of
            them; None keeps all.
        seed: seed of b.
    Raises:
        ValueError: for an unknown rule, or if b_eval or truncate is below 1; at the start, if
            truncate names an axis that the model has not.
    """

    source = "arXiv:2210.07558"
    requires = frozenset({"ordered"})
    exclusive = True
    moves = False
    hangs_gates = True
    earlier: ClassVar = {"rule": "drawn"}

    def __init__(
        self,
        frozen: bool = True,
        b_eval: int | None = None,
        truncate: int | dict[str, int] | None = None,
        seed: int = 0,
        rule: Literal["published", "drawn"] = "published",
    ) -> None:
        super().__init__(warmup=0, final=0, seed=seed)
        if rule not in ("published", "drawn"):
            raise UserError(f"rule={rule!r}; use 'published' or 'drawn'.")
        least = min(truncate.values(), default=1) if isinstance(truncate, dict) else truncate
        if (b_eval is not None and b_eval < 1) or (least is not None and least < 1):
            raise UserError(
                f"b_eval={b_eval}, truncate={truncate}: a prefix has at least one unit."
            )
        self.frozen, self.b_eval, self.truncate, self.rule = frozen, b_eval, truncate, rule

    @property
    def variant(self) -> str:
        return "" if self.rule == "published" else "drawn units only"

    def init_state(self, axes: Axes) -> PrefixState:
        return PrefixState()

    def install(self, state: PrefixState, axes: Axes) -> None:
        """Set the gates of a layer within its forward pass only.

        So a file or a merge in the middle of training holds all units.
        """
        for axis in axes.values():
            for layer, name in axis.members:
                gate = _GateOfPass(self, state, axis, name)
                self.run.handles.append(layer.register_forward_pre_hook(gate.set))
                self.run.handles.append(
                    layer.register_forward_hook(gate.take_away, always_call=True)
                )

    def drawn(self, step: int, most: int) -> int:
        """Return b of a step, uniform from 1 to `most`.

        It is the same on every process and after a resume.
        """
        return 1 + int(torch.randint(most, (), generator=generator(self.seed, "prefix", step)))

    def before_pass(self, state: PrefixState, axes: Axes) -> None:
        """Draw b of the next optimizer step."""
        most = max(1, *map(len, axes.values()))
        state.b = self.drawn(self.run.steps_done + 1, most)

    @staticmethod
    def gate(axis: RankAxis, b: int | None) -> Tensor:
        """Return r / b for the first b units and 0 for the others, (units,).

        Where a layer has several axes their gates multiply, so each takes a root of r / b.
        """
        size, axes_of_layer = len(axis), max(len(layer.axes) for layer, _ in axis.members)
        b = size if b is None else min(b, size)
        multiplier = size / b if b else 1.0
        gate = torch.zeros_like(leaf(axis))
        gate[:b] = multiplier ** (1 / axes_of_layer)
        return gate

    def update(self, state: PrefixState, axes: Axes) -> None:
        """Mask the gradients, and remember everything that the step must leave as it is."""
        state.untouched = []
        for element in elements(axes):
            mask = self._trained_entries(state.b, element, axes)
            if element.tensor.grad is not None:
                element.tensor.grad.mul_(mask)
            if self.rule == "published":
                continue
            for tensor in (element.tensor, *self.moments(element.tensor)):
                state.untouched.append(Untouched(tensor, tensor.detach().clone(), mask))

    def _trained_entries(self, b: int, element: Elements, axes: Axes) -> Tensor:
        """Return a mask of the entries that the present step trains, of the tensor's shape."""
        b = min(b, max(len(axes[key]) for key, _ in element.where))
        mask = _prefix(element, b)
        return mask & ~_prefix(element, b - 1) if self.frozen else mask

    def moments(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the optimizer's moments of a tensor."""
        for _, _, value in states_of(tensor, self.run.optimizers):
            yield value

    def finish_step(self, state: PrefixState, axes: Axes) -> None:
        """Restore everything that the step had to leave as it was; truncate after the last step."""
        known = {id(entry.tensor) for entry in state.untouched}
        for entry in state.untouched:
            entry.restore()
            # The first step makes the state. Where it trained nothing, moments are zero, and copies
            # of the weights equal the weights.
            if isinstance(entry.tensor, nn.Parameter):
                for _, role, value in states_of(entry.tensor, self.run.optimizers):
                    if id(value) in known:
                        continue
                    rest = (
                        entry.tensor.detach() if role is Role.WEIGHT_COPY else value.new_zeros(())
                    )
                    value.copy_(torch.where(entry.mask, value, rest.to(value)))
        state.untouched = []
        if self.truncate is not None and self.run.steps_done == self.run.phases.total:
            self.truncate_axes(axes, self.truncate)

    def truncate_axes(self, axes: Axes, b: int | dict[str, int]) -> None:
        """Keep the first b units of the axes, their gates multiplied in, and record it."""
        first = dict.fromkeys(axes, b) if isinstance(b, int) else b
        plan: Plan = {}
        for key, units in first.items():
            axes[key].gate = self.gate(axes[key], units)
            axes[key].fold(self.run.optimizers)
            if len(axes[key]) > units:
                plan[key] = Resize(tuple(range(units)))
        step = self.run.steps_done
        event = self.engine.apply(plan, step)
        reason = "the first units of each axis, as asked"
        if isinstance(b, int):
            reason = f"the first {b} units of each axis"
        event.update({"step": step, "reason": reason, "unit": self.unit})
        self.run.record(event)

    def check_start(self, sizes: Mapping[str, int]) -> None:
        for key in self.truncate if isinstance(self.truncate, dict) else ():
            if key not in sizes:
                close = nearest(key, sizes, cutoff=0) or next(iter(sizes))
                raise UserError(
                    f"truncate names {key!r}, which is no axis of this model; use one such as "
                    f"{close!r}."
                )


class _GateOfPass:
    """Sets the gate of one axis of a layer for a forward pass, and takes it away afterwards."""

    def __init__(self, policy: DyLoRA, state: PrefixState, axis: RankAxis, name: str) -> None:
        self.policy, self.state, self.axis, self.name = policy, state, axis, name

    def set(self, layer: Parameterization, args: Any) -> None:
        b = self.state.b if layer.training else self.policy.b_eval
        layer.gates = {**layer.gates, self.name: self.policy.gate(self.axis, b)}

    def take_away(self, layer: Parameterization, args: Any, output: Any) -> None:
        layer.gates = {key: gate for key, gate in layer.gates.items() if key != self.name}


def _prefix(element: Elements, b: int) -> Tensor:
    """Return a mask of the entries that belong to the first b units of each axis of a tensor."""
    mask = torch.ones_like(element.tensor, dtype=torch.bool)
    for _, dim in element.where:
        shape = [1] * element.tensor.dim()
        shape[dim] = -1
        mask &= (torch.arange(element.tensor.shape[dim], device=mask.device) < b).view(shape)
    return mask
