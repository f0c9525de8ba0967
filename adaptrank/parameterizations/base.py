"""The contract: a parameterization is a layer that wraps a layer and says what is trainable in its weight."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptrank.registry import Registry

PARAMETERIZATIONS: Registry["Parameterization"] = Registry("parameterization")
"""Class name -> class."""


class Parameterization(nn.Module, ABC):
    """A frozen `base` layer and a small trainable change of its weight W (m, n) = (out, in).

    A method states itself twice: `weight` is the paper's formula, slow and exact; `delta` (or `forward`) is the
    cheapest way to compute W' x. `base` may itself be a parameterization: wrappers nest, and each adds its change to the
    effective weight of what it wraps. The innermost bias is added exactly once and never scaled.

    Args:
        base: the layer to wrap; its parameters are frozen unless it is itself a wrapper.

    Raises:
        TypeError: if the class does not accept that kind of layer.
    """

    source: ClassVar[str]
    """arXiv id of the method."""
    mergeable: ClassVar[bool] = True
    """Whether W' exists as a dense matrix that can take the layer's place."""
    axes: Mapping[str, Mapping[str, int]] = {}
    """Rank axis -> {tensor name: the dimension that is the rank}. The last tensor named closes: it is zero in a fresh
    or closed unit. May be a property, or set in `__init__`, where it depends on the arguments."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Tensors that `adapt` ties across the layers of one kind and shape."""
    accepts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    """Layers that can be wrapped."""
    capabilities: ClassVar[frozenset[str]] = frozenset({"grow"})
    """What its axes allow beside pruning; an allocator that requires more is refused with a reason."""
    no_decay: ClassVar[tuple[str, ...]] = ()
    """Tensors exempt from weight decay: scales, gates, magnitudes."""
    exact_gradient: ClassVar[Mapping[str, Any]] = {}
    """Arguments under which the backward pass is the derivative of the forward, where by default it is not by design."""
    name: str = "default"
    """The adapter this wrapper belongs to."""
    enabled: bool = True
    """A wrapper that is off is transparent: it computes what its base computes."""
    init_args: dict[str, Any]
    """The constructor's arguments but `base`, defaults filled in; all that is needed to build the wrapper again."""
    base: nn.Module

    def __new__(cls, *args: Any, **kwargs: Any) -> "Parameterization":
        self = super().__new__(cls)
        if args or kwargs:  # copy and unpickling call __new__ without arguments and restore init_args themselves
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.__dict__["init_args"] = dict(list(bound.arguments.items())[2:])
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        PARAMETERIZATIONS.add(cls)
        formula = cls.__dict__.get("weight")
        if isinstance(formula, property) and not getattr(formula, "__isabstractmethod__", False):
            # A property cannot be wrapped in the class body of a subclass; mypy has no word for doing it here.
            type.__setattr__(cls, "_formula", formula.fget)
            type.__setattr__(cls, "weight", property(_weight, doc="W' (m, n), in the dtype of the frozen weight."))

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        innermost = base.innermost if isinstance(base, Parameterization) else base
        if not isinstance(innermost, self.accepts):
            fits = " or ".join(kind.__name__ for kind in self.accepts)
            raise TypeError(f"{type(self).__name__} wraps {fits}, not {type(innermost).__name__}.")
        if not isinstance(base, Parameterization):
            base.requires_grad_(False)
        self.base = base
        self.register_load_state_dict_post_hook(_refresh_after_load)  # type: ignore[no-untyped-call]

    @classmethod
    def example(cls) -> nn.Module:
        """A small base on which the contract tests build this method with its default arguments."""
        return nn.Linear(48, 24)

    # ---- what a method writes

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The definition: W' (m, n), slow and exact.

        The formula starts from `self.base_weight`, which is at least float32; read from outside, the property gives
        the result in the dtype of the frozen weight, as a plain layer would.
        """

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """What to add to y = base(x).

        Args:
            x: (..., n), in the adapter's dtype.
            y: (..., m), as the base returned it, bias included.
        """
        raise NotImplementedError(f"{type(self).__name__} must define delta(x, y) or forward(x).")

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw n new slices for every tensor of the axis but the closing one, which is zero in a fresh unit.

        The default draws from a normal distribution at the root mean square of the living units.
        """
        *opening, _ = self.axes[axis].items()
        slices = {}
        for name, dim in opening:
            living = cast(Tensor, getattr(self, name)).detach()
            rms = float(living.double().square().mean().sqrt())
            if rms == 0:
                raise ValueError(
                    f"{type(self).__name__}.axes[{axis!r}] names {name!r} before the tensor that closes the axis, but "
                    f"{name!r} is zero: name the zero-initialized tensor last."
                )
            shape = list(living.shape)
            shape[dim] = n
            slices[name] = rms * torch.randn(shape, generator=generator, dtype=torch.float64)
        return slices

    def max_units(self, axis: str) -> int | None:
        """Largest size the axis can take, or None where there is no ceiling."""
        return None

    def refresh(self) -> None:
        """Recompute whatever derives from axis tensors or from the base; called after each resize and each load."""

    def penalty(self) -> Tensor | None:
        """A regularizer of the method's own, already weighted; its gradient is added once a step, before scores."""
        return None

    # ---- what the library provides

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
        layer = self.innermost
        if isinstance(layer, Conv1D):
            return layer.nf, layer.nx
        return cast(int, layer.out_features), cast(int, layer.in_features)

    @property
    def bias(self) -> Tensor | None:
        """The innermost bias (m,), which every nest adds once."""
        return cast(Tensor | None, self.innermost.bias)

    @property
    def base_weight(self) -> Tensor:
        """The dense weight (m, n) of what this wraps, in float32 or better."""
        if isinstance(self.base, Parameterization):
            return self.base.dense()
        weight = cast(Tensor, self.base.weight)
        if isinstance(self.base, Conv1D):
            weight = weight.T
        return weight.to(self.adapter_dtype)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Float64 over a float64 layer, float32 over any other: small factors do not train in half precision."""
        return torch.promote_types(torch.float32, cast(Tensor, self.innermost.weight).dtype)

    def dense(self) -> Tensor:
        """W' (m, n) in the adapter's dtype; what merging casts down once. The base's where this wrapper is off."""
        if not self.enabled:
            return self.base_weight
        try:
            return self._formula()
        except AttributeError as error:  # nn.Module would report it as "no attribute 'weight'"
            raise RuntimeError(f"{type(self).__name__}.weight failed: {error}") from error

    def _formula(self) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no weight.")

    def zeros(self, *shape: int) -> nn.Parameter:
        """A trainable tensor of zeros on the base's device, in the adapter's dtype."""
        device = cast(Tensor, self.innermost.weight).device
        return nn.Parameter(torch.zeros(*shape, device=device, dtype=self.adapter_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """W' x + bias: (..., n) -> (..., m). Overridden only by methods that scale the input."""
        y = cast(Tensor, self.base(x))
        if not self.enabled:
            return y
        return y + self.delta(x.to(self._own_dtype()), y).to(y.dtype)

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
        m, n = self.shape
        sizes = [
            f"{axis}={getattr(self, next(iter(tensors))).shape[dim]}"
            for axis, tensors in self.axes.items()
            for dim in [next(iter(tensors.values()))]
        ]
        return ", ".join([f"{n} -> {m}", f"name={self.name!r}", *sizes, *([] if self.enabled else ["off"])])


def _weight(self: Parameterization) -> Tensor:
    # T5 reads `wo.weight.dtype` to decide how to cast its activations: outside, a wrapper's weight looks like its layer's.
    return self.dense().to(cast(Tensor, self.innermost.weight).dtype)


def _refresh_after_load(layer: nn.Module, _: object) -> None:
    cast(Parameterization, layer).refresh()


def wrapped_layers(model: nn.Module) -> dict[str, Parameterization]:
    """Path of each layer before it was wrapped -> its outermost wrapper, in the order of the model.

    A layer that is used at several places is listed once, at the first.
    """
    found: dict[str, Parameterization] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, Parameterization):
            found[path] = module
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of every wrapper of the model; a tied one once."""
    found = [p for layer in wrapped_layers(model).values() for w in layer.nest for _, p in w.own_parameters()]
    return list({id(p): p for p in found}.values())


def replace_layer(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model uses `old`: a layer may be shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                setattr(parent, name, new)


def adapted_part(module: nn.Module) -> nn.Module:
    """The module that axis keys and adapter files count paths from: `.backbone`, where all wrappers are in it, else itself."""
    backbone = getattr(module, "backbone", None)
    inside = isinstance(backbone, nn.Module) and len(wrapped_layers(backbone)) == len(wrapped_layers(module))
    return cast(nn.Module, backbone) if inside else module
