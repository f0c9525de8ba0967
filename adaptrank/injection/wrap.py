"""Build wrappers around layers, and tie the tensors that layers share."""

import json
from collections.abc import Mapping, Sequence

from torch import nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError, UserTypeError
from adaptrank.injection.makers import ParameterizationCallable
from adaptrank.injection.paths import block_of, last_name
from adaptrank.parameterizations import Parameterization


def wrap_layer(
    path: str, layer: nn.Module, makers: Sequence[ParameterizationCallable], name: str
) -> Parameterization | None:
    """Return a layer in its new wrappers, or None if it already carries exactly these.

    Raises:
        ValueError: if the layer already carries this adapter in another form, or a method refuses.
        TypeError: if a method cannot wrap this kind of layer.
    """
    nest = layer.nest if isinstance(layer, Parameterization) else []
    carried = [wrapper for wrapper in nest if wrapper.name == name]
    was_training = layer.training
    # Compare an adapter that is there with a new one over the same base. A second one over the
    # first may not even be possible.
    base = carried[0].base if carried else layer
    wrapped = _apply(makers, base, path)
    built = _wrappers_above(base, wrapped)
    for wrapper in built:
        wrapper.name = name
        if not wrapper.mergeable:
            _ensure_called(wrapper, path)
    if carried:
        _check_same(path, name, built, carried)
        return None
    for wrapper in built:
        wrapper.train_own(was_training)
    return wrapped


def _wrappers_above(base: nn.Module, outermost: nn.Module) -> list[Parameterization]:
    """List the wrappers of a nest that stand around `base`, innermost first."""
    above = []
    while outermost is not base and isinstance(outermost, Parameterization):
        above.append(outermost)
        outermost = outermost.base
    return above[::-1]


def _apply(
    makers: Sequence[ParameterizationCallable], base: nn.Module, path: str
) -> Parameterization:
    """Wrap a layer with each maker in turn, innermost first."""
    wrapped = base
    for maker in makers:
        try:
            wrapped = maker(wrapped)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path or 'the model'}: {error}") from error
        if not isinstance(wrapped, Parameterization):
            raise UserTypeError(
                f"A parameterization must return a wrapped layer; "
                f"{maker} returned {type(wrapped).__name__}."
            )
    assert isinstance(wrapped, Parameterization)
    return wrapped


def _ensure_called(wrapper: Parameterization, path: str) -> None:
    """Make sure that the model calls a wrapper that has no dense weight to read."""
    if kinds.is_read(wrapper.innermost):
        raise UserTypeError(
            f"{path}: nn.MultiheadAttention reads this weight instead of calling the layer, and "
            f"{type(wrapper).__name__} has none; exclude it."
        )
    wrapper.call_it()


def _check_same(
    path: str, name: str, built: Sequence[Parameterization], carried: Sequence[Parameterization]
) -> None:
    if _configuration(built) != _configuration(carried):
        methods = " on ".join(type(wrapper).__name__ for wrapper in reversed(carried))
        raise UserError(
            f"{path} already carries adapter {name!r} ({methods}); nest methods in one entry's "
            f"list, or give this one another name."
        )


def _configuration(nest: Sequence[Parameterization]) -> list[tuple[type, object]]:
    return [(type(wrapper), wrapper.init_args) for wrapper in nest]


def tie_shared(layers: Mapping[str, Parameterization], name: str) -> None:
    """Tie the `shared` tensors of new wrappers across layers, as far as `shared_over` says.

    A kind is the last component of the path, and a block is the path up to the last number before
    it. The position among the wrappers of this name has to agree as well. Wrappers of other names
    do not count as positions: they were tied or not when they were made, and have trained since.

    Args:
        layers: path -> the newly wrapped layer.
        name: name of the adapter.
    """
    owners: dict[object, Parameterization] = {}
    for path, layer in layers.items():
        for position, wrapper in enumerate(_outermost_named(layer, name)):
            if not wrapper.shared:
                continue
            arguments = json.dumps(wrapper.init_args)
            group = (_sharers(path, wrapper), position, type(wrapper), arguments)
            owner = owners.setdefault(group, wrapper)
            for tensor in wrapper.shared:
                setattr(wrapper, tensor, getattr(owner, tensor))


def _sharers(path: str, wrapper: Parameterization) -> object:
    """Return what layers have in common that share the tensors of a wrapper."""
    if wrapper.shared_over == "all":
        return "all"
    if wrapper.shared_over == "block":
        return block_of(path)
    return last_name(path), wrapper.shape


def _outermost_named(layer: nn.Module, name: str) -> list[Parameterization]:
    """List the outermost wrappers of this name, innermost first."""
    named = []
    while isinstance(layer, Parameterization) and layer.name == name:
        named.append(layer)
        layer = layer.base
    return named[::-1]
