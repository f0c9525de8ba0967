"""TensorTrainAdapter: a bottleneck adapter whose two matrices are tensor trains."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.ops import low_rank as products
from adaptrank.parameterizations import tensor_train_cores as trains
from adaptrank.parameterizations.base import Cost, Parameterization

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


class TensorTrainAdapter(Parameterization):
    """h <- h + s (f(h D + d) U + u), behind the layer or before it, with D (w, b) and U (b, w) as tensor trains.

    A bottleneck adapter of width b in series with the layer: h is its output, or with position="input" its input. Being
    nonlinear, it is no change of a weight and does not merge; it stands outermost in a nest. Each bond between two cores is
    a rank axis. The last core of U and both biases start at zero, so training starts at the frozen layer; the authors' code
    draws them too and does not (`init="released"`).

    Source: LoRETTA_adp, arXiv:2402.11417. Its scripts use a bottleneck of 64, tt_rank 5 and ReLU (its configuration defaults to tanh); on
        BERT-likes behind both output projections, on Llama before gate and up and behind down. That norms train beside it is the
        authors' intent: say train_modules for that.
    Shapes: h (..., w) with w = m, or n before the layer; D_k (r_{k-1}, n_k, r_k) for modes of w and then of b, U_k the other way; down (b,),
        up (w,), the biases d and u. Parameters: the sum of r_{k-1} n_k r_k over the cores of both, and b + w.
    Args:
        bottleneck: width b.
        tt_rank: size of every bond at the start, as far as its modes can use it.
        position: "output" or "input" of the layer.
        activation: f.
        modes: factors of w; automatic ones are as equal as possible, and at most 16 where w has such.
        scale: s.
        dropout: probability of dropping an element of h on the way to D, in [0, 1).
        init: "zero_last", or "released" for the authors' start.
    Raises:
        ValueError: if a size is below 1, a word is unknown, or modes do not multiply to w.
    """

    source = "arXiv:2402.11417"
    mergeable = False
    no_decay = ("down", "up")

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
        known = {
            "position": ("output", "input"),
            "activation": tuple(ACTIVATIONS),
            "init": ("zero_last", "released"),
        }
        for word, value in (("position", position), ("activation", activation), ("init", init)):
            if value not in known[word]:
                raise UserError(
                    f"{word}={value!r} is unknown; use one of {', '.join(known[word])}."
                )
        self.position, self.activation, self.scale = position, activation, scale
        self.dropout = nn.Dropout(dropout)
        self.width = self.shape[0 if position == "output" else 1]
        wide, narrow = trains.check_modes(modes, self.width, "modes"), trains.modes_of(bottleneck)
        self.split = {"D": len(wide), "U": len(narrow)}  # cores on the side that is read
        down = [*(wide if modes else reversed(wide)), *narrow]
        self.modes = {"D": down, "U": down[::-1]}  # one the mirror image of the other
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

    def cores(self, name: str) -> list[nn.Parameter]:
        """The cores of D or U, first to last."""
        return [getattr(self, f"{name}_{k}") for k in range(1, len(self.modes[name]) + 1)]

    def adapted(self, x: Tensor) -> Tensor:
        if self.position == "input":
            return self.base(x + self._change(x))  # type: ignore[no-any-return]
        y: Tensor = self.base(x)
        return y + self._change(y)

    def definition(self, *args: Any, **kwargs: Any) -> Any:
        def change(h: Tensor) -> Tensor:
            D, U = (
                trains.dense(self.cores("D"), self.width),
                trains.dense(self.cores("U"), len(self.down)),
            )
            return self.scale * (ACTIVATIONS[self.activation](h @ D + self.down) @ U + self.up)

        (x,) = args
        if not self.enabled:
            return self._below(x)
        if self.position == "input":
            return self._below(x + change(x))
        y = self._below(x)
        return y + change(y)

    def _below(self, x: Tensor) -> Tensor:
        """What it wraps, by its definition: dense, or another adapter's; what merges around an adapter has none."""
        base = self.base
        if all(wrapper.mergeable for wrapper in self.nest[:-1]):
            return cast(Tensor, super().definition(x))
        if isinstance(base, Parameterization) and not base.mergeable:
            return cast(Tensor, base.definition(x))
        return cast(Tensor, base(x))

    def _change(self, h: Tensor) -> Tensor:
        """s (f(h D + d) U + u), through the bonds in the middle of both trains."""
        dtype = (
            h.dtype if products.fits(h) else self.down.dtype
        )  # the trains are contracted in their own
        z = self.dropout(h.to(dtype)) @ self._left("D").to(dtype)
        z = ACTIVATIONS[self.activation](
            F.linear(z, self._right("D").T.to(dtype), self.down.to(dtype))
        )
        z = z @ self._left("U").to(dtype)
        return F.linear(
            z, (self.scale * self._right("U")).T.to(dtype), (self.scale * self.up).to(dtype)
        ).to(h.dtype)

    def _left(self, name: str) -> Tensor:
        return trains.left(self.cores(name)[: self.split[name]])

    def _right(self, name: str) -> Tensor:
        return trains.right(self.cores(name)[self.split[name] :])

    def cost(self) -> Cost:
        flops = once = kept = 0
        for name, rows, columns in (
            ("D", self.width, len(self.down)),
            ("U", len(self.down), self.width),
        ):
            cores, split = self.cores(name), self.split[name]
            bond = cores[split].shape[0]
            flops += 2 * bond * (rows + columns)
            once += trains.flops_left(cores[:split]) + trains.flops_right(cores[split:])
            kept += rows + bond
        return Cost(flops, once, kept + (len(self.down) if self.activation == "gelu" else 0))

    def max_units(self, axis: str) -> int:
        return trains.bonds(self.modes[axis[0].upper()])[int(axis[1:]) - 1]
