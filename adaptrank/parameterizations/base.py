"""The contract: a parameterization is a layer that wraps a layer and says what is trainable in its weight."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank import layers
from adaptrank._errors import UserError, UserTypeError
from adaptrank.ops import low_rank as products
from adaptrank.registry import Registry

PARAMETERIZATIONS: Registry["Parameterization"] = Registry("parameterization")
"""Class name -> class."""


@dataclass(frozen=True)
class Cost:
    """What a method adds to a frozen layer of its usual kind: closed formulas, which `testing.check_cost` measures.

    Args:
        flops: of matrix products, for each token, forward only; a multiplication and an addition are two.
        flops_once: of matrix products, once a call, however many tokens there are.
        kept: numbers that each token keeps for the backward pass, inputs that others keep as well included.
    """

    flops: int = 0
    flops_once: int = 0
    kept: int = 0


class Parameterization(nn.Module, ABC):
    """A frozen `base` layer and a small trainable change of its weight W (m, n) = (out, in).

    A method states itself twice: `weight` is the paper's formula, slow and exact; `product`, `delta` or `adapted` is the
    cheapest way to compute W' x. `base` may itself be a parameterization: wrappers nest, and each adds its change to the
    effective weight of what it wraps. The innermost bias is added exactly once and never scaled.

    Args:
        base: the layer to wrap; its parameters are frozen unless it is itself a wrapper.

    Raises:
        TypeError: if the class does not accept that kind of layer.
    """

    source: ClassVar[str]
    """arXiv id of the method."""
    mergeable: bool = True
    """Whether W' exists as a dense matrix that can take the layer's place; where arguments decide, an instance may say no."""
    axes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = {}
    """Rank axis -> {tensor name: the dimension that is the rank, or several of one square tensor}. The last tensor named
    closes: it is zero in a fresh or closed unit. So are the further dimensions of a square one: (0, 1) has rows that read from
    other units, and columns that feed them. May be a property where it depends on the arguments."""
    shared: tuple[str, ...] = ()
    """Tensors that `adapt` ties across the layers of one kind and shape. A constructor may set it where an argument decides."""
    accepts: ClassVar[tuple[type[nn.Module], ...]] = layers.LINEAR
    """Layers that can be wrapped; where types cannot say it, override `wraps`."""
    reads_weight: ClassVar[bool] = False
    """Whether the formula takes the weight it changes, rather than adding to it: what it wraps must then have a dense one."""
    reads_blocks: ClassVar[bool] = False
    """Whether the formula reads the spectrum or the blocks of W, so that a fused projection (query, key and value in one
    layer) is split by `adapt` unless it is told otherwise."""
    starts_at_base: bool = True
    """Whether training starts at what the frozen layer computes, to the last bit."""
    capabilities: ClassVar[frozenset[str]] = frozenset({"grow", "duplicate", "ordered", "pattern"})
    """What its axes allow beside pruning; an allocator that requires more is refused with a reason. The words:
    "grow": fresh units can be added. "duplicate": units are exchangeable, so a copy of one is a unit like any other. "ordered": the
    first units alone are a smaller method of the same kind. "pattern": the number of units may differ from layer to layer by a rule
    (not where they are thousands of coefficients). "matrix_rank": their number bounds the rank of the change. "input_directions": each
    is one direction of the input. "gradient_init": a start that follows the gradient of W is the closing factor's least-squares
    fit. "weight_gradient": the gradients of its factors give an estimate of that of W (`weight_gradient`)."""
    features: Mapping[str, tuple[int | None, int | None]] = {}
    """Tensor -> (the dimension that counts outputs, the one that counts inputs): what is cut when the layer loses some."""
    input_factor: Mapping[str, str] = {}
    """Axis -> its trained tensor (units, n) that multiplies the input: its axes are "input_factor", and "input_init" as well where
    that is not the closing one and may start anywhere."""
    by_product: ClassVar[bool] = False
    """Whether the forward pass adds U V x, with (U, V) = `product()`: so where a class has a `product` and says neither `delta` nor
    `adapted`. `products` computes it together with the layer's own product."""
    parts: int = 1
    """Parts of the layer that its units are spread over: where a rule chooses how many there are, it is a multiple of them."""
    no_decay: ClassVar[tuple[str, ...]] = ()
    """Tensors exempt from weight decay: scales, gates, magnitudes."""
    exact_gradient: ClassVar[Mapping[str, Any]] = {}
    """Arguments under which the backward pass is the derivative of the forward, where by default it is not by design."""
    name: str = "default"
    """The adapter this wrapper belongs to."""
    enabled: bool = True
    """A wrapper that is off is transparent: it computes what its base computes."""
    rows: tuple[Tensor, int] | None = None
    """(indices, batch size): the rows of a batch that this wrapper is on for; None is all."""
    gates: "Mapping[str, Tensor | Callable[[], Tensor]]" = {}
    """Axis -> what its units are multiplied by, (units,), or a function that gives it at each call. Hung here by an allocator."""
    init_args: dict[str, Any]
    """The constructor's arguments but `base`, defaults filled in; all that is needed to build the wrapper again."""
    base: nn.Module

    def __new__(cls, *args: Any, **kwargs: Any) -> "Parameterization":
        self = super().__new__(cls)
        if (
            args or kwargs
        ):  # copy and unpickling call __new__ without arguments and restore init_args themselves
            bound = _signature(cls).bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.__dict__["init_args"] = dict(list(bound.arguments.items())[2:])
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        PARAMETERIZATIONS.add(cls)
        if "by_product" not in cls.__dict__ and not {"product", "delta", "adapted"}.isdisjoint(
            cls.__dict__
        ):
            cls.by_product = "product" in cls.__dict__ and {"delta", "adapted"}.isdisjoint(
                cls.__dict__
            )
        formula = cls.__dict__.get("weight")
        if formula is None and not cls.mergeable:
            # A property cannot be wrapped in the class body of a subclass; mypy has no word for doing it here.
            type.__setattr__(
                cls,
                "weight",
                property(_weight, doc="The weight of what this wraps: it is not changed."),
            )
        elif isinstance(formula, property) and not getattr(formula, "__isabstractmethod__", False):
            type.__setattr__(cls, "_formula", formula.fget)
            type.__setattr__(
                cls,
                "weight",
                property(_weight, doc="W' (m, n), in the dtype of the frozen weight."),
            )
        if isinstance(bias := cls.__dict__.get("bias"), property):
            type.__setattr__(cls, "_trained_bias", bias.fget)
            type.__setattr__(
                cls, "bias", property(_bias, doc="The bias, in the dtype of the frozen weight.")
            )

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        name = type(self).__name__
        innermost = base.innermost if isinstance(base, Parameterization) else base
        if not self.wraps(innermost):
            raise UserTypeError(
                f"{name} wraps {self.wraps_what()}, not {type(innermost).__name__}."
            )
        if reason := layers.unsupported(innermost):
            raise UserTypeError(f"{name}: {reason}.")
        if not isinstance(base, Parameterization):
            training = {
                id(p) for p in adapter_parameters(base)
            }  # a module may hold layers that are wrapped already
            for parameter in base.parameters():
                if id(parameter) not in training:
                    parameter.requires_grad_(False)
        self.base = base
        if self.reads_weight:
            self.needs_weight()
        self.register_load_state_dict_post_hook(_refresh_after_load)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        """What a wrapper does not have, the innermost layer may: code that looks into a layer sees the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What the class itself defines got here because it raised: that error is the one to see.
            if hasattr(type(self), name) or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.innermost, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._claim(name, self._parameters)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        self._claim(name, self._buffers)
        super().register_buffer(name, tensor, persistent)

    def _claim(self, name: str, tensors: dict[str, Any]) -> None:
        """Let a tensor have a name that the innermost layer has too; nn.Module would find it there, and refuse it."""
        own = (self.__dict__, self._parameters, self._buffers, self._modules)
        if not hasattr(type(self), name) and not any(name in names for names in own):
            tensors[name] = None

    @classmethod
    def wraps(cls, layer: nn.Module) -> bool:
        """Whether the method can wrap this plain layer."""
        return isinstance(layer, cls.accepts)

    @classmethod
    def wraps_what(cls) -> str:
        """In words, for errors and tables."""
        *most, last = [kind.__name__ for kind in cls.accepts]
        return f"{', '.join(most)} or {last}" if most else last

    @classmethod
    def example(cls) -> nn.Module:
        """A small base on which the contract tests build this method with its default arguments."""
        return nn.Linear(48, 24)

    def example_input(self, leading: tuple[int, ...], random: torch.Generator) -> Tensor:
        """An input of the example, drawn on the CPU: (*leading, n) unless the layer reads something else."""
        return layers.example_input(self.innermost, leading, random)

    # ---- what a method writes

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The definition: W' (m, n), slow and exact.

        The formula starts from `self.base_weight`, which is at least float32; read from outside, the property gives
        the result in the dtype of the frozen weight, as a plain layer would.
        """

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """What to add to y = base(x), (..., m): U V x of the `product` unless a method knows a cheaper way.

        Args:
            x: (..., n), in the adapter's dtype; of an embedding the tokens, of a convolution its input. `self.project(x, A)`
                is A x for all of them.
            y: (..., m), as the base returned it, bias included; channels last for a convolution too.
        """
        product = self.product()
        if product is None:
            raise NotImplementedError(
                f"{type(self).__name__} must define product(), delta(x, y) or adapted(x)."
            )
        U, V = product
        return F.linear(self.project(self.dropped(x), V), U)

    def adapted(self, *args: Any, **kwargs: Any) -> Any:
        """W' x + bias: (..., n) -> (..., m). Overridden by methods that do more than add to the output."""
        (x,) = args
        if self.by_product and self.multiplies(x):
            product = self.product()
            if product is not None:
                return self.with_product(x, *product)
        y = cast(Tensor, self.base(x))
        own = x.to(self._own_dtype()) if x.is_floating_point() else x
        change = self.delta(own, layers.channels_last(self.innermost, y))
        return y + layers.channels_first(self.innermost, change).to(y.dtype)

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw n new slices for every tensor of the axis but the closing one, which is zero in a fresh unit.

        The default draws from a normal distribution at the root mean square of the living units.
        """
        *opening, (closing, _) = self.factors(axis)
        slices: dict[str, Tensor] = {}
        for name, dim in opening:
            if (
                name == closing or name in slices
            ):  # a further dimension of a square tensor is zero, too
                continue
            living = cast(Tensor, getattr(self, name)).detach()
            rms = float(living.double().square().mean().sqrt())
            if rms == 0:
                raise UserError(
                    f"{type(self).__name__}.axes[{axis!r}] names {name!r} before the tensor that closes the axis, but "
                    f"{name!r} is zero: name the zero-initialized tensor last."
                )
            shape = list(living.shape)
            shape[dim] = n
            slices[name] = rms * torch.randn(shape, generator=generator, dtype=torch.float64)
        return slices

    def of_inputs(self, axis: str, values: Tensor) -> Tensor:
        """Values of the layer's inputs (n,), as the input-side factor meets them: its shape, or one that expands to it."""
        return values

    def max_units(self, axis: str) -> int | None:
        """Largest size the axis can take, or None where there is no ceiling."""
        return None

    def refresh(self) -> None:
        """Recompute whatever derives from axis tensors or from the base; called after each resize and each load."""

    def penalty(self) -> Tensor | None:
        """A regularizer of the method's own, already weighted; its gradient is added once a step, before scores."""
        return None

    def product(self) -> tuple[Tensor, Tensor] | None:
        """(U (m, k), V (k, n)) of what this method adds, W' = W + U V whatever W is; None where it has no such form.

        What composition, spectra and exports work on, without a matrix of the layer's size (`low_rank`), and what most methods
        compute their forward pass with (`by_product`).
        """
        return None

    def weight_gradient(self) -> Tensor:
        """An estimate of the gradient of W' (m, n) from those of the factors, where the method is "weight_gradient"."""
        raise NotImplementedError(
            f"{type(self).__name__} has no estimate of the gradient of its weight."
        )

    def cost(self) -> Cost | None:
        """What it adds to the frozen layer's time and memory, as closed formulas of its sizes; None is not said."""
        return None

    # ---- what the library provides

    def factors(self, axis: str) -> list[tuple[str, int]]:
        """(tensor, dimension) of an axis, the closing one last; a tensor with several dimensions on it stands there several times."""
        named = self.axes[axis].items()
        return [
            (name, dim)
            for name, dims in named
            for dim in (dims if isinstance(dims, tuple) else (dims,))
        ]

    def needs_weight(self) -> None:
        """Refuse a base without a dense weight; called by a constructor where one variant only reads it.

        Raises:
            ValueError: names the wrapper that has none.
        """
        name, *formless = (
            type(self).__name__,
            *(type(w).__name__ for w in self.nest[:-1] if not w.mergeable),
        )
        if formless:
            raise UserError(
                f"{name} takes the weight of what it wraps, and {formless[0]} has none; put {formless[0]} outermost, "
                f"[{name}, {formless[0]}]."
            )

    def multiplies(self, x: Tensor) -> bool:
        """Whether `products` is what to compute with: the layer is linear, in a dtype that is safe to sum in, and there is no autocast."""
        return isinstance(self.innermost, layers.LINEAR) and products.fits(x)

    def with_product(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """base(x) + U V x, (..., m), of U (m, k) and V (k, n) in the adapter's dtype."""
        dropped = self.dropped(x)
        plain = products.plain(self.base) if dropped is x else None
        if plain is not None and plain[0].dtype == x.dtype:
            return products.linear(x, *plain, U, V)
        return self.accumulated(x, F.linear(dropped, V.to(x.dtype)), U)

    def accumulated(self, x: Tensor, z: Tensor, U: Tensor) -> Tensor:
        """base(x) + U z, (..., m); of z and U see `products.accumulate`."""
        y = cast(Tensor, self.base(x))
        return products.accumulate(y, z.to(y.dtype), U, fresh=products.plain(self.base) is not None)

    def dropped(self, x: Tensor) -> Tensor:
        """The input with `self.dropout` applied, if the method has one; x itself where nothing is dropped, as of tokens."""
        dropout = self._modules.get("dropout")
        if (
            not isinstance(dropout, nn.Dropout)
            or not dropout.p
            or not dropout.training
            or not x.is_floating_point()
        ):
            return x
        return cast(Tensor, dropout(x))

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """A x: what the innermost layer would compute with A (k, n) for its weight, without a bias; (..., k)."""
        return layers.project(self.innermost, x, A)

    @property
    def innermost(self) -> nn.Module:
        """The layer under all wrappers."""
        layer = self.base
        while isinstance(layer, Parameterization):
            layer = layer.base
        return layer

    @property
    def nest(self) -> "list[Parameterization]":
        """This wrapper and those it wraps, innermost first."""
        inner = self.base.nest if isinstance(self.base, Parameterization) else []
        return [*inner, self]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in), whatever kind of layer the innermost is."""
        return layers.shape(self.innermost)

    @property
    def bias(self) -> Tensor | None:
        """The bias (m,) of what this computes: the innermost's, which every nest adds once, unless a method trains it."""
        return Parameterization._trained_bias(
            self
        )  # a method that trains it starts from `super().bias`

    def _trained_bias(self) -> Tensor | None:
        """The bias in the adapter's dtype where a method trains it, else the frozen one."""
        base = self.base
        if isinstance(base, Parameterization):
            return base._trained_bias()
        return cast(Tensor | None, getattr(base, "bias", None))

    @property
    def base_weight(self) -> Tensor:
        """The dense weight (m, n) of what this wraps, in float32 or better."""
        if isinstance(self.base, Parameterization):
            return self.base.dense()
        return layers.dense(self.base, self.adapter_dtype)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Float64 over a float64 layer, float32 over any other: small factors do not train in half precision."""
        return torch.promote_types(torch.float32, layers.dtype(self.innermost))

    def dense(self) -> Tensor:
        """W' (m, n) in the adapter's dtype, under autocast too; what merging casts down once. The base's where this wrapper is off."""
        if not self.enabled:
            return self.base_weight
        device = layers.device(self.innermost).type
        autocasts = torch.amp.is_autocast_available(device)  # the meta device knows none
        try:
            with (
                torch.autocast(device, enabled=False) if autocasts else nullcontext(),
                self._gated(),
            ):
                return self._formula()
        except AttributeError as error:  # nn.Module would report it as "no attribute 'weight'"
            raise RuntimeError(f"{type(self).__name__}.weight failed: {error}") from error

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(U (m, k), V (k, n)) with U V the change of this nest, W' - W, in the adapter's dtype; None where a wrapper has no such form.

        Wrappers that are off count for nothing; where all are, k is 0.
        """
        if not isinstance(self.innermost, layers.MATRICES):
            return None
        (m, n), dtype = self.shape, self.adapter_dtype
        Us, Vs = [], []
        for wrapper in self.nest:
            if wrapper.enabled:
                with wrapper._gated():
                    product = wrapper.product()
                if product is None:
                    return None
                Us.append(product[0].detach().to(dtype))
                Vs.append(product[1].detach().to(dtype))
        device = layers.device(self.innermost)
        if not Us:
            return torch.zeros(m, 0, device=device, dtype=dtype), torch.zeros(
                0, n, device=device, dtype=dtype
            )
        return (Us[0], Vs[0]) if len(Us) == 1 else (torch.cat(Us, 1), torch.cat(Vs))

    def _formula(self) -> Tensor:
        return self.base_weight  # of a method without a dense form, which leaves the weight alone

    def merged(self) -> dict[str, Tensor]:
        """Parameter of the innermost layer -> its value with this change, and those inside, folded in.

        In the adapter's dtype, and in the layout of the layer. What merging writes, and what `definition` computes with.
        """
        inner = self.base.merged() if isinstance(self.base, Parameterization) else {}
        if not self.enabled:
            return inner
        values = {**inner, "weight": layers.stored(self.innermost, self.dense())}
        bias = self._trained_bias()
        if bias is not None and bias is not getattr(self.innermost, "bias", None):
            values["bias"] = bias
        return values

    def definition(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `forward`, slow and exact: the innermost layer with its merged parameters.

        A method without a dense form writes here what its paper says.
        """
        plain = self.innermost
        values = {
            name: p.to(self.adapter_dtype) for name, p in plain.named_parameters()
        } | self.merged()
        if "bias" in values and getattr(plain, "bias", None) is None:
            y = torch.func.functional_call(
                plain, {k: v for k, v in values.items() if k != "bias"}, args, kwargs
            )
            return layers.channels_first(plain, layers.channels_last(plain, y) + values["bias"])
        return torch.func.functional_call(plain, values, args, kwargs)

    def call_it(self) -> RemovableHandle:
        """Have torch's nn.TransformerEncoderLayer call this layer where it would read its weight: a module with a hook is called."""
        return self.register_forward_pre_hook(_nothing)

    def zeros(self, *shape: int) -> nn.Parameter:
        """A trainable tensor of zeros on the base's device, in the adapter's dtype."""
        return nn.Parameter(
            torch.zeros(*shape, device=layers.device(self.innermost), dtype=self.adapter_dtype)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `adapted` computes, where this wrapper is on; elsewhere what the base does."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        if len(kwargs) == 1 and not args and isinstance(self.innermost, layers.MATRICES):
            args, kwargs = (
                tuple(kwargs.values()),
                {},
            )  # linear(input=x): the methods know no such name
        if self.gates:
            with self._gated():
                return self._on_its_rows(*args, **kwargs)
        return self._on_its_rows(*args, **kwargs)

    def _on_its_rows(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None:
            return self.adapted(*args, **kwargs)
        rows, batch = self.rows
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or len(x) != batch:
            got = f"{len(x)} rows" if isinstance(x, Tensor) else "more than one tensor"
            raise UserError(
                f"Rows were selected for a batch of {batch}, and this {type(self).__name__} reads {got}."
            )
        y = cast(Tensor, self.base(x))
        if not len(rows):
            return y
        with self._alone():
            own = cast(Tensor, self.adapted(x[rows]))
        return y.index_copy(0, rows, own.to(y.dtype))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the wrappers inside, only those of this adapter on, for whatever rows come."""
        before = [(wrapper, wrapper.enabled, wrapper.rows) for wrapper in self.nest[:-1]]
        try:
            for wrapper, enabled, _ in before:
                wrapper.enabled, wrapper.rows = enabled and wrapper.name == self.name, None
            yield
        finally:
            for wrapper, enabled, rows in before:
                wrapper.enabled, wrapper.rows = enabled, rows

    @contextmanager
    def _gated(self) -> Iterator[None]:
        """The closing factor of each gated axis times its gate; gradients reach both."""
        gates, whole = (
            self.gates,
            {name: self._parameters[name] for name in {self.factors(a)[-1][0] for a in self.gates}},
        )
        try:
            self._parameters.update({name: self.folded(name) for name in whole})  # type: ignore[misc]
            self.gates = {}  # they are in: who reads the weight inside of a forward must not multiply again
            yield
        finally:
            self.gates = gates
            self._parameters.update(whole)

    def folded(self, name: str, only: str | None = None) -> Tensor:
        """A tensor of this wrapper with the gates of its axes, or of one, multiplied in: what a file or a merge holds."""
        tensor = cast(Tensor, getattr(self, name))
        for axis, gate in self.gates.items():
            closing, dim = self.factors(axis)[-1]
            if closing == name and only in (None, axis):
                values = gate() if callable(gate) else gate
                shape = [1] * tensor.dim()
                shape[dim] = -1
                tensor = tensor * values.to(tensor).view(shape)
        return tensor

    def _own_dtype(self) -> torch.dtype:
        """What the adapter's tensors really are: `adapter_dtype`, unless someone cast the whole model afterwards."""
        own = (parameter.dtype for parameter in self._parameters.values() if parameter is not None)
        return next(own, self.adapter_dtype)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable tensors of this wrapper alone, not those of a wrapper inside it."""
        for name, parameter in self.named_parameters():
            if not name.startswith("base."):
                yield name, parameter

    def extra_repr(self) -> str:
        """One line in a printed model: the adapter's name, the shape, what the axes hold."""
        sizes = [
            f"{axis}={getattr(self, name).shape[dim]}"
            for axis in self.axes
            for name, dim in self.factors(axis)[:1]
        ]
        shape = (
            [f"{self.shape[1]} -> {self.shape[0]}"]
            if isinstance(self.innermost, layers.MATRICES)
            else []
        )
        return ", ".join(
            [*shape, f"name={self.name!r}", *sizes, *([] if self.enabled else ["off"])]
        )


def _weight(self: Parameterization) -> Tensor:
    # T5 reads `wo.weight.dtype` to decide how to cast its activations: outside, a wrapper's weight looks like its layer's.
    if not hasattr(self.innermost, "weight"):
        raise AttributeError(f"{type(self.innermost).__name__} has no weight.")
    return self.dense().to(layers.dtype(self.innermost))


def _bias(self: Parameterization) -> Tensor | None:
    bias = self._trained_bias()
    return None if bias is None else bias.to(layers.dtype(self.innermost))


def _nothing(layer: nn.Module, arguments: object) -> None:
    """A hook that only is there."""


def _refresh_after_load(layer: nn.Module, _: object) -> None:
    cast(Parameterization, layer).refresh()


@cache
def _signature(cls: type[Parameterization]) -> inspect.Signature:
    return inspect.signature(cls.__init__)


@cache
def on_example(cls: type[Parameterization]) -> Parameterization:
    """The method with default arguments on its example, built once and only to be looked at: what a class cannot say, as its axes may
    depend on arguments, this can."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(cls.example())


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path before anything was wrapped -> module, of everything in a model; of a wrapped one its outermost wrapper.

    In the order of the model. A module that is used at several places is listed once, at the first.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[path] = module
        plain = module.innermost if isinstance(module, Parameterization) else module
        seen.add(id(plain))
        for name, child in plain.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def wrapped_layers(model: nn.Module) -> dict[str, Parameterization]:
    """Path of each layer before it was wrapped -> its outermost wrapper, in the order of the model."""
    return {
        path: layer
        for path, layer in named_layers(model).items()
        if isinstance(layer, Parameterization)
    }


def wrappers(model: nn.Module) -> list[Parameterization]:
    """Every wrapper of a model, in its order; of a nest the innermost first."""
    return [wrapper for layer in wrapped_layers(model).values() for wrapper in layer.nest]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of every wrapper of the model; a tied one once."""
    found = [p for wrapper in wrappers(model) for _, p in wrapper.own_parameters()]
    return list({id(p): p for p in found}.values())


def replace_layer(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model uses `old`: a layer may be shared."""
    replace_layers(model, {old: new})


def replace_layers(model: nn.Module, pairs: Mapping[nn.Module, nn.Module]) -> None:
    """The same of many, {old: new}, in one walk through the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            new = pairs.get(child) if child is not None else None
            if new is not None and parent is not new:
                setattr(parent, name, new)


def adapted_part(module: nn.Module) -> nn.Module:
    """The module that axis keys and adapter files count paths from: `.backbone`, where all wrappers are in it, else itself."""
    backbone = getattr(module, "backbone", None)
    inside = isinstance(backbone, nn.Module) and len(wrapped_layers(backbone)) == len(
        wrapped_layers(module)
    )
    return cast(nn.Module, backbone) if inside else module
