"""TensorTrainAdapter: a bottleneck adapter whose two matrices are tensor trains."""

from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank._options import COUNT
from adaptrank.ops import low_rank
from adaptrank.parameterizations import tensor_train_cores as trains
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.module import ModuleWrapper
from adaptrank.parameterizations.tensor_kinds import TensorKind

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}

CHOICES = {
    "position": ("output", "input"),
    "activation": tuple(ACTIVATIONS),
    "init": ("zero_last", "released"),
}
"""Argument -> the words that it takes."""


class TensorTrainAdapter(ModuleWrapper):
    """h <- h + s (f(h D + d) U + u), behind the layer or before it.

    D (w, b) and U (b, w) are tensor trains. This is a bottleneck adapter of width b in series with
    the layer: h is its output, or with position="input" its input. Being nonlinear, it is no change
    of a weight and does not merge. It stands outermost in a nest. Each bond between two cores is a
    rank axis. The last core of U and both biases start at zero, so training starts at the frozen
    layer. The authors' code draws them too, so its training does not (`init="released"`).

    Source: LoRETTA_adp, arXiv:2402.11417. Its scripts use a bottleneck of 64, tt_rank 5 and ReLU
        (its configuration defaults to tanh), on BERT-likes behind both output projections, on Llama
        before gate and up and behind down. That norms train beside it is the authors' intent. Say
        train_modules for that.
    Shapes: h (..., w) with w = m, or n before the layer. D_k (r_{k-1}, n_k, r_k) for modes of w and
        then of b, U_k the other way. down (b,) and up (w,) are the biases d and u. Parameters: the
        sum of r_{k-1} n_k r_k over the cores of both, and b + w.
    Args:
        bottleneck: width b.
        tt_rank: size of every bond at the start, as far as its modes can use it.
        position: "output" or "input" of the layer.
        activation: f.
        modes: factors of w. Automatic ones are as equal as possible, and at most 16 if w has such
            factors.
        scale: s.
        dropout: probability of dropping an element of h on the way to D, in [0, 1).
        init: "zero_last", or "released" for the authors' start.
    Raises:
        ValueError: if a size is below 1, a word is unknown, or modes do not multiply to w.
    """

    source = "arXiv:2402.11417"
    ranges: ClassVar = {"modes": COUNT}
    mergeable = False
    no_decay = ("down", "up")
    kinds = {"down": TensorKind.OFFSETS, "up": TensorKind.OFFSETS}

    def __init__(
        self,
        base: nn.Module,
        *,
        bottleneck: int = 64,
        tt_rank: int = 5,
        position: Literal["output", "input"] = "output",
        activation: Literal["relu", "tanh", "gelu"] = "relu",
        modes: list[int] | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        init: Literal["zero_last", "released"] = "zero_last",
    ) -> None:
        super().__init__(base)
        if bottleneck < 1 or tt_rank < 1:
            raise UserError(f"bottleneck={bottleneck}, tt_rank={tt_rank}: use 1 or more of both.")
        for argument, word in (("position", position), ("activation", activation), ("init", init)):
            if word not in CHOICES[argument]:
                choices = ", ".join(CHOICES[argument])
                raise UserError(f"{argument}={word!r} is unknown; use one of {choices}.")
        self.position, self.activation, self.scale = position, activation, scale
        self.dropout = nn.Dropout(dropout)
        self.width = self.shape[0 if position == "output" else 1]
        wide, narrow = trains.check_modes(modes, self.width, "modes"), trains.modes_of(bottleneck)
        # Number of cores on the side of a train that reads its input.
        self.split = {"D": len(wide), "U": len(narrow)}
        down = [*(wide if modes else reversed(wide)), *narrow]
        # One train is the mirror image of the other.
        self.modes = {"D": down, "U": down[::-1]}
        for name, sizes in self.modes.items():
            for k, shape in enumerate(trains.core_shapes(sizes, tt_rank), 1):
                self.register_parameter(f"{name}_{k}", self.zeros(*shape))
            for core in self.cores(name):
                trains.draw(core, self.width + bottleneck, len(sizes))
        self.down, self.up = self.zeros(bottleneck), self.zeros(self.width)
        self.starts_at_base = init == "zero_last"
        if init == "zero_last":
            nn.init.zeros_(self.cores("U")[-1])
        else:
            for bias in (self.down, self.up):
                nn.init.uniform_(bias, -(len(bias) ** -0.5), len(bias) ** -0.5)

    @property
    def axes(self) -> Mapping[str, Mapping[str, int | tuple[int, ...]]]:  # type: ignore[override]
        return trains.axes(self.modes)

    def cores(self, name: str) -> list[Tensor]:
        """Return the cores of D or U, first to last, with their gates."""
        return trains.gated_cores(self, name, len(self.modes[name]))

    def forward_adapted(self, x: Tensor) -> Tensor:
        if self.position == "input":
            return self.base(self._add_change(x))  # type: ignore[no-any-return]
        return self._add_change(self.base(x))

    def definition(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self._define_base(x)
        if self.position == "input":
            return self._define_base(x + self._define_change(x))
        y = self._define_base(x)
        return y + self._define_change(y)

    def _define_change(self, h: Tensor) -> Tensor:
        """Return s (f(h D + d) U + u) with D and U as whole matrices."""
        D = trains.dense(self.cores("D"), self.width)
        U = trains.dense(self.cores("U"), len(self.down))
        return self.scale * (ACTIVATIONS[self.activation](h @ D + self.down) @ U + self.up)

    def _define_base(self, x: Tensor) -> Tensor:
        """Compute what it wraps by its definition, if it has one."""
        base = self.base
        if all(wrapper.mergeable for wrapper in self.nest[:-1]):
            return cast(Tensor, super().definition(x))
        if isinstance(base, Parameterization) and not base.mergeable:
            return cast(Tensor, base.definition(x))
        # A method that merges, around an adapter that does not, has no definition.
        return cast(Tensor, base(x))

    def _add_change(self, h: Tensor) -> Tensor:
        """Return h + s (f(h D + d) U + u), through the bonds in the middle of both trains."""
        # Elsewhere the trains are contracted in their own dtype.
        fits = low_rank.fits(h)
        dtype = h.dtype if fits else self.down.dtype
        D_left, D_right = self._halves("D")
        U_left, U_right = self._halves("U")
        z = self.dropout(h.to(dtype)) @ D_left.to(dtype)
        z = F.linear(z, D_right.T.to(dtype), self.down.to(dtype))
        z = ACTIVATIONS[self.activation](z) @ U_left.to(dtype)
        if not fits:
            up = (self.scale * self.up).to(dtype)
            return h + F.linear(z, (self.scale * U_right).T.to(dtype), up).to(h.dtype)
        total = torch.add(h, self.up.to(dtype), alpha=self.scale)
        return low_rank.accumulate(
            total, z, U_right.T, fresh=total.is_contiguous(), scale=self.scale
        )

    def _halves(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a train as two matrices, (rows, bond) and (bond, columns), at its middle bond."""
        cores, split = self.cores(name), self.split[name]
        return trains.left(cores[:split]), trains.right(cores[split:])

    def cost(self) -> Cost:
        flops = once = kept = 0
        narrow = len(self.down)
        for name, rows, columns in (("D", self.width, narrow), ("U", narrow, self.width)):
            cores, split = self.cores(name), self.split[name]
            bond = cores[split].shape[0]
            flops += 2 * bond * (rows + columns)
            once += trains.flops_left(cores[:split]) + trains.flops_right(cores[split:])
            kept += rows + bond
        return Cost(flops, once, kept + (narrow if self.activation == "gelu" else 0))

    def acts_without(self, axis: str) -> bool:
        return True  # both biases

    def stopped_by(self, axis: str) -> Collection[str]:
        return [other for other in self.axes if other[0] == axis[0]]  # bonds of the same train

    def max_units(self, axis: str) -> int:
        return trains.max_bond(self.modes, axis)
