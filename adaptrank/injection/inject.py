"""Adapt a model: find layers, freeze everything, and wrap the layers."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter

from adaptrank._errors import UserError
from adaptrank.axes import fit_on_load, rank_axes
from adaptrank.injection.fused import split_fused_layers
from adaptrank.injection.left_out import warn_of_left_out
from adaptrank.injection.makers import ParameterizationCallable, as_makers
from adaptrank.injection.match import find_modules, match_layers
from adaptrank.injection.outside_base import warn_of_frozen_heads
from adaptrank.injection.rank_pattern import RankPattern, resize_by_pattern
from adaptrank.injection.switch import is_merged
from adaptrank.injection.trained_whole import forget_trained, record_trained
from adaptrank.injection.transaction import undone_on_error
from adaptrank.injection.wrap import tie_shared, wrap_layer
from adaptrank.parameterizations import (
    Parameterization,
    named_layers,
    plain_parameters,
    replace_layers,
    wrapped_layers,
)

Model = TypeVar("Model", bound=nn.Module)


def adapt(
    model: Model,
    targets: str | Sequence[str] = "all-linear",
    parameterization: ParameterizationCallable | Sequence[ParameterizationCallable] = (),
    *,
    exclude: str | Sequence[str] = (),
    name: str = "default",
    train_modules: Sequence[str] = (),
    rank_pattern: RankPattern | None = None,
    split_fused: bool | Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> Model:
    """Freeze `model`, and wrap the layers that `targets` names.

    A second call with the same arguments changes nothing. After an error the model is unchanged.
    `describe(model)` lists the wrapped layers. A frozen module outside of the pretrained part of a
    transformers model, such as a new classifier, is named in the log.

    Args:
        model: any module. The library need not know its class.
        targets: "all-linear" (linear layers without output embeddings), "all" (every module that
            the method wraps: norms, attention, convolutions), a regular expression that matches
            whole paths, or a list of last components of paths, such as ["q_proj", "v_proj"].
        parameterization: what to wrap with. The first of a sequence is innermost.
        exclude: layers or whole parts of the model to leave alone: regular expressions, or last
            components of paths.
        name: name of the adapter. Several adapters on one layer need several names.
        train_modules: paths, or last components of paths, of modules to train whole, such as a new
            classifier. They are saved with the adapter, also if they are frozen by then. All
            adapters of the model use them.
        rank_pattern: sizes to start from: axis key, path, last component or regular expression ->
            units, or {axis: units}. The scale of a method stays that of its `rank` argument.
        split_fused: treat the parts of a fused projection as layers of their own: GPT-2's `c_attn`
            becomes `c_attn.q`, `.k` and `.v`. None splits where the method reads the spectrum or
            the blocks of a weight. A mapping gives the equal parts of layers:
            {"c_attn": ["q", "k", "v"]}.
        seed: seed of the generator that initializes units which `rank_pattern` adds.
    Returns:
        The same model.
    Raises:
        ValueError: if nothing matches, a name is unknown, or a layer already carries this adapter
            in another form.
        TypeError: if a method cannot wrap a matched layer.
    """
    wrap_targets(
        model,
        targets,
        parameterization,
        exclude=exclude,
        name=name,
        train_modules=train_modules,
        rank_pattern=rank_pattern,
        split_fused=split_fused,
        seed=seed,
    )
    warn_of_frozen_heads(model)
    return model


def wrap_targets(
    model: nn.Module,
    targets: str | Sequence[str],
    parameterization: ParameterizationCallable | Sequence[ParameterizationCallable],
    *,
    exclude: str | Sequence[str] = (),
    name: str = "default",
    train_modules: Sequence[str] = (),
    rank_pattern: RankPattern | None = None,
    split_fused: bool | Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> None:
    """Adapt a model as `adapt` does, without the warning about frozen heads."""
    makers = as_makers(parameterization)
    if is_merged(model):
        raise UserError(
            "This model is merged, with its originals kept; "
            "unmerge() it before it gets further adapters."
        )
    _check_sizes(model)
    whole_modules = find_modules(model, train_modules)
    split = split_fused_layers(model, makers, split_fused)
    with undone_on_error(model, split.layers, whole_modules.values()):
        modules = named_layers(model)
        if not wrapped_layers(model):
            # What an adapter trained that is gone is a part of the base now.
            forget_trained(model)
        trained = _trained_parameters(model)
        paths = match_layers(modules, targets, makers, exclude, whole_modules)
        split.keep_matched(model, modules, paths)
        wrapped = _wrap_layers(modules, paths, makers, name)
        _freeze(model, trained)
        replace_layers(model, {modules[path]: layer for path, layer in wrapped.items()})
        tie_shared(wrapped, name)
        trained_whole: list[nn.Parameter] = []
        for module in whole_modules.values():
            module.requires_grad_(True)
            trained_whole += plain_parameters(module)
        record_trained(model, trained_whole)
        if rank_pattern:
            _resize_new_axes(model, wrapped, name, rank_pattern, seed)
    fit_on_load(model)
    warn_of_left_out(named_layers(model), targets, wrapped.values())


def _check_sizes(model: nn.Module) -> None:
    """Refuse a model with lazy layers, whose tensors have no size before the first batch."""
    if not any(isinstance(p, UninitializedParameter) for p in plain_parameters(model)):
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UserError(f"{name} has no size yet; pass one batch through the model first.")


def _trained_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that an earlier call of `adapt` left to train."""
    if not wrapped_layers(model):
        return set()
    return {id(parameter) for parameter in plain_parameters(model) if parameter.requires_grad}


def _wrap_layers(
    modules: Mapping[str, nn.Module],
    paths: Sequence[str],
    makers: Sequence[ParameterizationCallable],
    name: str,
) -> dict[str, Parameterization]:
    """Build the new wrappers by path. Layers that already carry them are left out."""
    wrapped = {}
    for path in paths:
        layer = wrap_layer(path, modules[path], makers, name)
        if layer is not None:
            wrapped[path] = layer
    return wrapped


def _freeze(model: nn.Module, trained: set[int]) -> None:
    """Freeze all parameters outside of wrappers but these, which go on training."""
    for parameter in plain_parameters(model):
        parameter.requires_grad_(id(parameter) in trained)


def _resize_new_axes(
    model: nn.Module,
    wrapped: Mapping[str, Parameterization],
    name: str,
    rank_pattern: RankPattern,
    seed: int,
) -> None:
    """Give the axes of new wrappers their first sizes.

    Axes of older wrappers stay as they are: a second call must not undo what an allocator did.
    """
    if not wrapped:
        return
    new = {id(w) for layer in wrapped.values() for w in layer.nest if w.name == name}
    axes = {}
    for key, axis in rank_axes(model).items():
        if any(id(wrapper) in new for wrapper, _ in axis.members):
            axes[key] = axis
    resize_by_pattern(model, axes, rank_pattern, seed)
