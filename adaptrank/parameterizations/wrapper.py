"""The mechanics of a layer that wraps a layer, without a formula."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank import layers
from adaptrank._errors import UserError, UserTypeError
from adaptrank._options import OptionProbe, OptionsFit, check_arguments
from adaptrank.parameterizations.deep_nests import (
    FEW_WRAPPERS,
    allow_recursion,
    find_innermost,
    forward_deep,
    nests_changed,
    noop_hook,
)
from adaptrank.parameterizations.renamed import renamed_use
from adaptrank.parameterizations.selected_rows import check_rows, put_rows
from adaptrank.parameterizations.traits import Traits
from adaptrank.parameterizations.unmerged_saving import guard_save_pretrained

if TYPE_CHECKING:
    from adaptrank.parameterizations.base import Parameterization


MOST_TENSORS = 1024
"""Largest number of tensors of one wrapper."""


class Wrapper(Traits, nn.Module, ABC):
    """A module around a frozen `base`, which may itself be a wrapper.

    It owns what every wrapper does alike: it records its arguments, freezes its base, takes part in
    a nest, belongs to a named adapter that can be off or on for some rows of a batch only, and
    multiplies gates into its closing factors.
    """

    name: str = "default"
    """Name of the adapter that this wrapper belongs to."""
    enabled: bool = True
    """Whether the wrapper is on. One that is off computes what its base computes."""
    idle: bool = False
    """Whether an axis without units leaves nothing to add. An idle wrapper costs nothing."""
    rows: tuple[Tensor, int] | None = None
    """(indices, batch size): the rows of a batch that this wrapper is on for, or None for all."""
    gates: "Mapping[str, Tensor | Callable[[], Tensor]]" = {}
    """Axis -> factors of its units, (units,), or a function that returns them."""
    init_args: dict[str, Any]
    """Arguments of the constructor but `base`, with defaults. They build the wrapper again."""
    base: nn.Module
    wraps_a_base: ClassVar[bool] = True
    """Mark of a wrapper. It is read faster than `isinstance` of an abstract class."""
    nest_depth: int = 1
    """Number of wrappers of the nest up to this one when it was made."""
    _given_weight: Tensor | None = None
    _gates_read: frozenset[str] = frozenset()

    # The constructors of methods call `super().__init__(base)` and nothing more, so __init__ of
    # this class never sees the other arguments. Python passes all of them to __new__.
    def __new__(cls, *args: Any, **kwargs: Any) -> "Wrapper":
        if inspect.isabstract(cls):
            raise UserTypeError(
                f"{cls.__name__} does not define {', '.join(sorted(cls.__abstractmethods__))}; "
                f"a method without a dense weight derives from ModuleWrapper."
            )
        self = super().__new__(cls)
        # Copying and unpickling call __new__ without arguments, and restore init_args themselves.
        if args or kwargs:
            self.__dict__["init_args"] = _arguments(cls, self, *args, **kwargs)
            check_arguments(cls, self.init_args)
            if any(isinstance(value, OptionProbe) for value in (*args, *kwargs.values())):
                raise OptionsFit
        return self

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        # Every instance has these attributes of its own. A compiled block asks where an attribute
        # is, and a wrapper that gets one later would not fit the graph of its neighbours.
        for name in ("enabled", "idle", "rows"):
            self.__dict__[name] = getattr(type(self), name)
        if isinstance(type(self).gates, Mapping):
            self.gates = dict(type(self).gates)
        if isinstance(base, Wrapper):
            self.nest_depth = base.nest_depth + 1
            allow_recursion(self.nest_depth)
        else:
            _freeze(base)
        self.base = base
        guard_save_pretrained()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        allow_recursion(self.nest_depth)
        guard_save_pretrained()

    # ---- attributes

    def __getattr__(self, name: str) -> Any:
        """Look an attribute up in the innermost layer if the wrapper has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A property of the class gets here by raising AttributeError: show that error.
            if hasattr(type(self), name) or "base" not in self.__dict__.get("_modules", {}):
                raise
            if sentence := renamed_use(type(self), name):
                raise AttributeError(sentence) from None
            return getattr(self.innermost, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, which may have the name of one of the innermost layer."""
        if len(self._parameters) >= MOST_TENSORS:
            raise UserError(
                f"{type(self).__name__} would have more than {MOST_TENSORS:,} tensors on this "
                f"layer; choose arguments that give fewer."
            )
        self._claim(name, self._parameters)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a buffer, which may have the name of one of the innermost layer."""
        self._claim(name, self._buffers)
        super().register_buffer(name, tensor, persistent)

    def _claim(self, name: str, tensors: dict[str, Any]) -> None:
        """Reserve a name, which nn.Module would refuse if it found it in the innermost layer."""
        taken = (self.__dict__, self._parameters, self._buffers, self._modules)
        if not hasattr(type(self), name) and not any(name in names for names in taken):
            tensors[name] = None

    # ---- the nest

    @property
    def innermost(self) -> nn.Module:
        """The layer under all wrappers."""
        if self.nest_depth > FEW_WRAPPERS:
            return find_innermost(self)
        # `isinstance` of an abstract class, and attributes of a module, are slow to read.
        layer: Any = self._modules["base"]
        while getattr(type(layer), "wraps_a_base", False):
            layer = layer._modules["base"]
        return cast(nn.Module, layer)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Another base is another nest for all wrappers around this one."""
        if name == "base" and "base" in self._modules:
            nests_changed()
        super().__setattr__(name, value)

    @property
    def nest(self) -> "list[Parameterization]":
        """This wrapper and the wrappers inside of it, innermost first."""
        nest: list[Any] = []
        layer: Any = self
        while getattr(type(layer), "wraps_a_base", False):
            nest.append(layer)
            layer = layer._modules["base"]
        return nest[::-1]

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield path and module in the order of nn.Module, without a recursion over the nest."""
        memo = set() if memo is None else memo
        waiting: list[tuple[str, nn.Module]] = [(prefix, self)]
        while waiting:
            path, module = waiting.pop()
            if not isinstance(module, Wrapper):
                yield from module.named_modules(memo, path, remove_duplicate)
                continue
            if module in memo:
                continue
            if remove_duplicate:
                memo.add(module)
            yield path, module
            for name, child in reversed(module._modules.items()):
                if child is not None:
                    waiting.append((f"{path}.{name}" if path else name, child))

    def train_own(self, mode: bool) -> None:
        """Set the mode of this wrapper and of its own modules, without that of its base."""
        self.training = mode
        for child in self.own_modules().values():
            child.train(mode)

    def train(self, mode: bool = True) -> "Wrapper":
        """Set the mode of the whole nest."""
        for wrapper in self.nest:
            wrapper.train_own(mode)
        self.innermost.train(mode)
        return self

    # ---- tensors

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype of new tensors: float64 over a float64 layer, float32 over any other.

        Small factors do not train in half precision.
        """
        return torch.promote_types(torch.float32, layers.dtype(self.innermost))

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Dtype of the tensors now. It differs from `adapter_dtype` after a cast of the model."""
        dtypes = (p.dtype for p in self._parameters.values() if p is not None)
        return next(dtypes, self.adapter_dtype)

    def zeros(self, *shape: int) -> nn.Parameter:
        """Return a trainable tensor of zeros on the base's device, in the adapter's dtype."""
        device = layers.device(self.innermost)
        return nn.Parameter(torch.zeros(*shape, device=device, dtype=self.adapter_dtype))

    def own_modules(self) -> dict[str, nn.Module]:
        """Return name -> module, of the modules of this wrapper beside its base."""
        return {
            name: module
            for name, module in self._modules.items()
            if module is not None and name != "base"
        }

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the named parameters of this wrapper, without those of its base."""
        yield from self.named_parameters(recurse=False)
        for name, module in self.own_modules().items():
            yield from module.named_parameters(prefix=name)

    def own_tensors(self) -> dict[str, Tensor]:
        """Return name -> tensor, of all saved tensors of this wrapper, without those of its base.

        Names and order are those of a state dict.
        """
        tensors: dict[str, Tensor] = {}
        self._save_to_state_dict(tensors, "", keep_vars=True)
        for name, module in self.own_modules().items():
            module.state_dict(destination=tensors, prefix=f"{name}.", keep_vars=True)
        return tensors

    def axis_tensors(self, axis: str) -> list[tuple[str, int]]:
        """Return the (tensor name, dimension) pairs of an axis, the closing factor last.

        A tensor with several dimensions on the axis is listed once for each.
        """
        pairs = []
        for name, dims in self.axes[axis].items():
            for dim in dims if isinstance(dims, tuple) else (dims,):
                pairs.append((name, dim))
        return pairs

    def axis_size(self, axis: str) -> int:
        """Return the number of units of an axis."""
        name, dim = self.axis_tensors(axis)[0]
        return int(getattr(self, name).shape[dim])

    # ---- gates

    def gated(self, name: str, axis: str | None = None) -> Tensor:
        """Return a tensor with its gates multiplied in, or the tensor itself if it has none.

        A method reads its closing factors through this. Files and merges hold what it returns.

        Args:
            name: name of the tensor.
            axis: multiply in the gate of this axis only.
        """
        tensor: Tensor | None = self._parameters.get(name)
        if tensor is None:
            tensor = cast(Tensor, getattr(self, name))
        for gated_axis, gate in self.gates.items():
            closing, dim = self.axis_tensors(gated_axis)[-1]
            if closing != name or axis not in (None, gated_axis):
                continue
            values = gate() if callable(gate) else gate
            shape = [1] * tensor.dim()
            shape[dim] = -1
            tensor = tensor * values.to(tensor).view(shape)
            self._gates_read = self._gates_read | {gated_axis}
        return tensor

    @contextmanager
    def reading_gates(self) -> Iterator[None]:
        """Check that a computation within the context reads every gate of this wrapper.

        Raises:
            UserError: if a method reads a closing factor itself, and so ignores its gate.
        """
        if not self.gates:
            yield
            return
        self._gates_read = frozenset()
        yield
        for axis in self.gates:
            if axis not in self._gates_read:
                name = self.axis_tensors(axis)[-1][0]
                raise UserError(
                    f"{type(self).__name__} ignores the gate on its axis {axis!r}: read the "
                    f"closing factor as self.gated({name!r}), not as self.{name}."
                )

    # ---- the forward pass

    @abstractmethod
    def forward_adapted(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the adapted output, for a wrapper that is on for all rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the adapted output where this wrapper is on, and the base's output elsewhere."""
        if self.nest_depth > FEW_WRAPPERS and len(args) == 1 and not kwargs:
            return forward_deep(cast("Parameterization", self), args[0])
        if not self.enabled or self.idle:
            return self.base(*args, **kwargs)
        if not (kwargs or self.gates or self.rows):
            return self.forward_adapted(*args)
        if len(kwargs) == 1 and not args and isinstance(self.innermost, layers.MATRICES):
            # A call such as linear(input=x). The methods do not know the name.
            args, kwargs = tuple(kwargs.values()), {}
        if self.rows is not None:
            return self._forward_rows(*args, **kwargs)
        return self.forward_gated(*args, **kwargs)

    @property
    def only_adds(self) -> bool:
        """Whether the output is that of the base with `add_change`, and nothing more."""
        return False

    def add_change(self, x: Any, y: Any) -> Any:
        """Return the adapted output from the output y of the base, if this wrapper only adds."""
        raise NotImplementedError

    def add_to(self, x: Any, y: Any) -> Any:
        """Return the adapted output from the output y of the base, in all rows or in some."""
        if self.idle:
            return y
        if self.rows is not None:
            check_rows(self, x)
            return put_rows(self, x, y)
        with self.reading_gates():
            return self.add_change(x, y)

    def forward_gated(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the adapted output for all rows, and check that the gates are read."""
        if not self.gates:
            return self.forward_adapted(*args, **kwargs)
        with self.reading_gates():
            return self.forward_adapted(*args, **kwargs)

    def _forward_rows(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the adapted output for some rows, and the base's output for the others."""
        x = args[0] if len(args) == 1 and not kwargs else None
        check_rows(self, x)
        return put_rows(self, x, self.base(x))

    def call_it(self) -> RemovableHandle:
        """Register a hook, so that nn.TransformerEncoderLayer calls this layer.

        Otherwise its fused fast path would read the layer's weight.
        """
        return self.register_forward_pre_hook(noop_hook)


def _freeze(base: nn.Module) -> None:
    """Freeze a module, except for the adapters of layers inside of it."""
    adapters: set[int] = set()
    for module in base.modules():
        if isinstance(module, Wrapper):
            adapters.update(id(parameter) for _, parameter in module.own_parameters())
    for parameter in base.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def _arguments(cls: type[Wrapper], self: Wrapper, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the constructor's arguments without `self` and `base`, with defaults filled in."""
    bound = _signature(cls).bind(self, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[2:])


@cache
def _signature(cls: type[Wrapper]) -> inspect.Signature:
    return inspect.signature(cls.__init__)
