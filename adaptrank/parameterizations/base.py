"""The contract of a method: a layer that wraps a layer, and the change of its weight."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError, UserTypeError
from adaptrank.ops import low_rank as ops
from adaptrank.parameterizations.deep_nests import FEW_WRAPPERS, dense_deep
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import check_formula, dense_weight, formula
from adaptrank.parameterizations.indices import check_indices
from adaptrank.parameterizations.nest_factors import nest_factors
from adaptrank.parameterizations.renamed import renamed_definition
from adaptrank.parameterizations.starting import draw_fresh
from adaptrank.parameterizations.wrapper import Wrapper
from adaptrank.registry import Registry

PARAMETERIZATIONS: Registry["Parameterization"] = Registry("parameterization")
"""Class name -> class."""


@dataclass(frozen=True)
class Cost:
    """Cost of a method over its frozen layer, as closed formulas. `testing.check_cost` measures it.

    Args:
        flops: operations of matrix products for each token, forward only. A multiplication and an
            addition are two.
        flops_once: operations of matrix products for each call, whatever the number of tokens.
        kept: numbers that each token keeps for the backward pass. Inputs that other layers keep as
            well are included.
    """

    flops: int = 0
    flops_once: int = 0
    kept: int = 0


FIT_FIRST = (
    "The state dict has other ranks than this model; call adaptrank.fit_ranks(model, state_dict) "
    "before load_state_dict, with all tensors of each axis in it."
)
"""Sentence beside the size mismatches that PyTorch reports."""


class Parameterization(Wrapper):
    """A frozen `base` layer and a small trainable change of its weight W (m, n) = (out, in).

    A method states itself twice. `weight` is the paper's formula, slow and exact. `delta` or
    `forward_adapted` computes W' x in the cheapest way. A method whose change is a product of two
    thin factors derives from `LowRankUpdate` and states these instead. `base` may itself be a
    parameterization: wrappers nest, and each adds its change to the effective weight of what it
    wraps. The innermost bias is added exactly once and never scaled.

    Args:
        base: the layer to wrap. Its parameters are frozen unless it is itself a wrapper.

    Raises:
        UserTypeError: if the class does not accept that kind of layer.
    """

    _is_linear: bool = False

    def __init_subclass__(cls, listed: bool = True, **kwargs: Any) -> None:
        """Add the class to `PARAMETERIZATIONS`. One with `listed=False` is no method to choose."""
        super().__init_subclass__(**kwargs)
        PARAMETERIZATIONS.add(cls, listed)

    def __init__(self, base: nn.Module) -> None:
        if sentence := renamed_definition(type(self)):
            raise UserTypeError(sentence)
        innermost = base.innermost if isinstance(base, Wrapper) else base
        name = type(self).__name__
        if not self.wraps(innermost):
            kind = type(innermost).__name__
            raise UserTypeError(f"{name} wraps {self.wraps_what()}, not {kind}.")
        if reason := layers.unsupported(innermost):
            raise UserTypeError(f"{name}: {reason}.")
        super().__init__(base)
        self._is_linear = isinstance(innermost, layers.LINEAR)
        check_formula(self)
        if self.reads_weight:
            self.require_weight()
        self.register_load_state_dict_post_hook(_refresh_after_load)  # type: ignore[no-untyped-call]

    # ---- which layers a method wraps

    @classmethod
    def wraps(cls, layer: nn.Module) -> bool:
        """Return whether the method can wrap this plain layer."""
        return isinstance(layer, cls.accepts)

    @classmethod
    def wraps_what(cls) -> str:
        """Return what the method wraps in words, for errors and tables."""
        *most, last = [kind.__name__ for kind in cls.accepts]
        return f"{', '.join(most)} or {last}" if most else last

    @classmethod
    def example(cls) -> nn.Module:
        """Return a small base on which the contract tests build this method."""
        return nn.Linear(48, 24)

    def example_input(self, leading: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Draw an input of the example on the CPU, by default (*leading, n)."""
        return layers.example_input(self.innermost, leading, random)

    def require_weight(self) -> None:
        """Refuse a base without a dense weight.

        A constructor calls it if only one variant of the method reads the weight.

        Raises:
            UserError: names the wrapper that has none.
        """
        name = type(self).__name__
        for wrapper in self.nest[:-1]:
            if not wrapper.mergeable:
                inner = type(wrapper).__name__
                raise UserError(
                    f"{name} takes the weight of what it wraps, and {inner} has none; put {inner} "
                    f"outermost, [{name}, {inner}]."
                )

    # ---- what a method writes

    @formula
    @abstractmethod
    def weight(self) -> Tensor:
        """The definition: W' (m, n), slow and exact, computed from `self.base_weight`."""

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what to add to y = base(x), (..., m).

        Args:
            x: (..., n), in the adapter's dtype. An embedding reads tokens, and a convolution its
                input. `self.project(x, A)` is A x for all of them.
            y: (..., m), as the base returned it, bias included. Channels are last for a
                convolution, too.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define delta(x, y) or forward_adapted(x), or derive from "
            f"LowRankUpdate and define factors()."
        )

    def forward_adapted(self, x: Tensor) -> Tensor:
        """Return W' x + bias, (..., n) -> (..., m): the output of the base plus `delta`.

        A method overrides it to do more than add to the output.
        """
        return self.add_change(x, cast(Tensor, self.base(x)))

    @property
    def only_adds(self) -> bool:
        return type(self).forward_adapted is Parameterization.forward_adapted

    def add_change(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y = base(x) with `delta` added, in the layout and the dtype of y."""
        inputs = x.to(self.parameter_dtype) if x.is_floating_point() else x
        change = self.delta(inputs, layers.channels_last(self.innermost, y))
        return y + layers.channels_first(self.innermost, change).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (U (m, k), V (k, n)) with W' = W + U V for any W, or None without such a form.

        Composition, spectra and exports work on the factors, without a matrix of the layer's size.
        """
        return None

    def factor_pair(self) -> FactorPair | None:
        """Return the two factors on whose product alone the output depends, or None.

        A method states it if (B T, T^-1 A) is the same layer for every invertible T. Optimizers of
        factor pairs, such as LoRA-RITE, ask for it.
        """
        return None

    def trained_bias(self) -> Tensor | None:
        """Return the bias (m,), in the adapter's dtype if a method of the nest trains it.

        A method that trains it starts from `super().trained_bias()`.
        """
        for wrapper in reversed(self.nest[:-1]):
            if type(wrapper).trained_bias is not Parameterization.trained_bias:
                return wrapper.trained_bias()
        return cast(Tensor | None, getattr(self.innermost, "bias", None))

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw n new slices for every tensor of the axis but the closing one, which starts at zero.

        The default draws from a normal distribution at the root mean square of the living units. If
        none is left, or all are zero, it is that of the tensor as the constructor draws it.
        """
        return draw_fresh(self, axis, n, generator)

    def max_units(self, axis: str) -> int | None:
        """Return the largest size of the axis, or None if there is no ceiling."""
        return None

    def index_ranges(self) -> Mapping[str, range]:
        """Return the range of values of every buffer of whole numbers.

        A method states it for each such buffer that is saved. A file or a checkpoint with a number
        outside of its range is refused.
        """
        return {}

    def numbers_beside_tensors(self) -> int:
        """Return how many numbers the wrapper draws or keeps beside its saved tensors.

        The loader refuses a file whose wrappers ask for too many of them.
        """
        return 0

    def acts_without(self, axis: str) -> bool:
        """Return whether the wrapper still changes its base when the axis has no units.

        A method overrides it that trains something beside the units, such as a magnitude.
        """
        return False

    def stopped_by(self, axis: str) -> Collection[str]:
        """Return the axes whose units add nothing while this axis has no units: by default all.

        Units that grow there meanwhile may start anywhere, because the output does not show them.
        """
        return self.axes

    def refresh(self) -> None:
        """Recompute what derives from axis tensors or from the base.

        It is called after each resize and each load.
        """

    def penalty(self) -> Tensor | None:
        """Return a regularizer, already weighted. Its gradient is added once a step."""
        return None

    def of_inputs(self, axis: str, values: Tensor) -> Tensor:
        """Return values of the layer's inputs (n,) in a shape that fits the input-side factor."""
        return values

    def weight_gradient(self) -> Tensor:
        """Return an estimate of the gradient of W' (m, n), from the gradients of the factors."""
        raise NotImplementedError(f"{type(self).__name__} does not estimate its weight's gradient.")

    def cost(self) -> Cost | None:
        """Return the cost over the frozen layer, or None if the method does not state it."""
        return None

    # ---- what a method uses

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in), for every kind of innermost layer."""
        return layers.shape(self.innermost)

    @property
    def base_weight(self) -> Tensor:
        """The dense weight (m, n) of what this wraps, in float32 or better."""
        if self._given_weight is not None:
            return self._given_weight
        if isinstance(self.base, Parameterization):
            return self.base.dense()
        return layers.dense(self.base, self.adapter_dtype)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """Return A x, (..., k): the output of the innermost layer for the weight A (k, n).

        The bias is left out.
        """
        return layers.project(self.innermost, x, A)

    def apply_dropout(self, x: Tensor) -> Tensor:
        """Return the input with `self.dropout` applied, or x itself if nothing is dropped."""
        dropout = self._modules.get("dropout")
        if not isinstance(dropout, nn.Dropout) or not dropout.p or not dropout.training:
            return x
        return cast(Tensor, dropout(x)) if x.is_floating_point() else x

    # `ops.low_rank` computes a product together with that of the layer. These three methods are the
    # only place that decides where it does.

    def fuses(self, x: Tensor) -> bool:
        """Return whether products with x are fused with the layer's own.

        The layer must be linear, and the dtype of x safe to sum in.
        """
        return self._is_linear and ops.fits(x)

    def add_product(self, x: Tensor, U: Tensor, V: Tensor, scale: float = 1.0) -> Tensor:
        """Return base(x) + s U V x, (..., m), for U (m, k) and V (k, n) in the adapter's dtype."""
        base, inputs = cast(nn.Module, self._modules["base"]), self.apply_dropout(x)
        plain = ops.plain(base, x.dtype) if inputs is x else None
        if plain is not None:
            return ops.linear(x, *plain, U, V, scale)
        return self.add_low_rank(x, F.linear(inputs, V.to(x.dtype)), U, scale)

    def add_low_rank(self, x: Tensor, z: Tensor, U: Tensor, scale: float = 1.0) -> Tensor:
        """Return base(x) + s U z, (..., m), for z and U as in `ops.low_rank.accumulate`."""
        base = cast(nn.Module, self._modules["base"])
        y: Tensor = base(x)
        is_fresh = ops.plain(base) is not None
        return ops.accumulate(y, z.to(y.dtype), U, fresh=is_fresh, scale=scale)

    # ---- what others ask

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        """Load as any module does, and say what to do about ranks of another size."""
        super()._load_from_state_dict(state_dict, prefix, *more)
        errors = more[-1]
        resizable = {name for axis in self.axes for name, _ in self.axis_tensors(axis)}
        resizable.update(name for stack in self.stacks.values() for name in stack)
        mismatches = tuple(f"size mismatch for {prefix}{name}:" for name in resizable)
        differ = any(error.startswith(mismatches) for error in errors)
        is_explained = any(not error.startswith("size mismatch") for error in errors)
        if differ and not is_explained:
            errors.append(FIT_FIRST)

    def renew(self) -> None:
        """Bring `idle`, and what the method derives from its tensors, up to date.

        It has to be called after tensors of the wrapper or of its base were replaced.
        """
        self.idle = bool(self.emptied())
        self.refresh()

    def emptied(self) -> list[str]:
        """List the axes without units, and without which the wrapper changes nothing."""
        empty = [axis for axis in self.axes if not self.axis_size(axis)]
        return [axis for axis in empty if not self.acts_without(axis)]

    @property
    def bias(self) -> Tensor | None:
        """The bias (m,) in the dtype of the frozen weight, as a plain layer has it."""
        bias = self.trained_bias()
        return None if bias is None else bias.to(layers.dtype(self.innermost))

    def dense(self) -> Tensor:
        """Return W' (m, n) in the adapter's dtype, also under autocast.

        It is the weight of the base if this wrapper is off.
        """
        return dense_weight(self) if self.nest_depth <= FEW_WRAPPERS else dense_deep(self.nest)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return (U (m, k), V (k, n)) with U V = W' - W, the change of the whole nest.

        The factors have the adapter's dtype. Wrappers that are off count for nothing. If all of
        them are off, k is 0. It is None if a wrapper has no factors.
        """
        return nest_factors(self)

    def merged(self) -> dict[str, Tensor]:
        """Return parameter of the innermost layer -> its value with the changes of the nest.

        Values have the adapter's dtype and the layout of the layer. Merging writes them, and
        `definition` computes with them.
        """
        inside = self.nest[-2::-1]
        if not self.enabled or self.idle:
            inner = next((w for w in inside if w.enabled and not w.idle), None)
            return {} if inner is None else inner.merged()
        # Wrappers inside that merge a weight and a bias are in the values of this one already.
        plain_merge = Parameterization.merged
        inner = next((w for w in inside if type(w).merged is not plain_merge), None)
        values = {} if inner is None else inner.merged()
        values["weight"] = layers.stored(self.innermost, self.dense())
        bias = self.trained_bias()
        if bias is not None and bias is not getattr(self.innermost, "bias", None):
            values["bias"] = bias
        return values

    def definition(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the forward pass slowly and exactly: the innermost layer with merged parameters.

        A method without a dense form writes its paper's definition here.
        """
        plain = self.innermost
        frozen = {name: p.to(self.adapter_dtype) for name, p in plain.named_parameters()}
        values = {**frozen, **self.merged()}
        # A trained bias over a layer that has none is added by hand.
        added = values.pop("bias") if "bias" in values and _has_no_bias(plain) else None
        y = torch.func.functional_call(plain, values, args, kwargs)
        if added is None:
            return y
        return layers.channels_first(plain, layers.channels_last(plain, y) + added)

    def extra_repr(self) -> str:
        """Return the shape, the adapter's name and the sizes of the axes, for a printed model."""
        words = []
        if isinstance(self.innermost, layers.MATRICES):
            words.append(f"{self.shape[1]} -> {self.shape[0]}")
        words.append(f"name={self.name!r}")
        words += [f"{axis}={self.axis_size(axis)}" for axis in self.axes]
        if not self.enabled:
            words.append("off")
        return ", ".join(words)


def _has_no_bias(layer: nn.Module) -> bool:
    return getattr(layer, "bias", None) is None


def _refresh_after_load(layer: nn.Module, _: object) -> None:
    wrapper = cast(Parameterization, layer)
    for name in wrapper.index_ranges():
        check_indices(wrapper, name, getattr(wrapper, name))
    wrapper.renew()


@cache
def on_example(cls: type[Parameterization]) -> Parameterization:
    """Return the method with default arguments on its example, built once and only to be read.

    It answers what a class cannot, because axes may depend on arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(cls.example())
