"""Match layers by path: what `targets`, `exclude` and `train_modules` mean in a model."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError, did_you_mean, some
from adaptrank.injection.left_out import left_out_weights, rescaled_layers
from adaptrank.injection.makers import ParameterizationCallable, method_of
from adaptrank.injection.paths import ends_in, last_name, lies_in
from adaptrank.parameterizations import Parameterization, named_layers, plain_modules


def match_layers(
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    makers: Sequence[ParameterizationCallable],
    exclude: str | Sequence[str] = (),
    train_modules: Collection[str] = (),
) -> list[str]:
    """Return the paths of the layers to wrap, in the order of the model.

    Args:
        modules: path -> module, of the whole model.
        targets: see `adapt`.
        makers: see `adapt`.
        exclude: see `adapt`.
        train_modules: paths of modules that train whole. Nothing inside them is wrapped.
    Raises:
        ValueError: if nothing matches, or an entry names nothing.
    """
    matched = _match_targets(modules, targets, makers)
    excluded = [*train_modules, *_match_excluded(modules, exclude)]
    paths = [path for path in matched if not lies_in(path, excluded)]
    if not paths:
        raise UserError(_no_match(modules, targets, exclude, makers[0]))
    rescaled = rescaled_layers(modules)
    for path in paths:
        if path in rescaled:
            raise UserError(f"{path}: {rescaled[path]}.")
    if "" in paths:
        raise UserError("The model is itself a layer; wrap it directly, as in LoRA(layer, rank=8).")
    return paths


def find_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return path -> module, of the modules that `train_modules` names.

    Args:
        model: any module.
        names: whole paths, or last components of paths.
    Raises:
        ValueError: for a name that no module has.
    """
    modules = named_layers(model)
    matched: dict[str, nn.Module] = {}
    for name in names:
        with_name = {path: module for path, module in modules.items() if ends_in(path, name)}
        if not with_name:
            known = {last_name(path) for path in modules if path}
            raise UserError(
                f"train_modules names {name!r}, which this model does not have."
                f"{did_you_mean(name, known)}"
            )
        matched.update(with_name)
    return matched


def innermost(module: nn.Module) -> nn.Module:
    """Return the frozen layer inside a wrapper, or the module itself if it is no wrapper."""
    return module.innermost if isinstance(module, Parameterization) else module


def _match_targets(
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    makers: Sequence[ParameterizationCallable],
) -> list[str]:
    """Return the paths that the targets name. A split layer stands for its parts."""
    if targets in ("all", "all-linear"):
        return _match_kind(modules, targets == "all-linear", makers)
    if isinstance(targets, str):
        named = _match_expression(modules, targets)
    else:
        named = _match_names(modules, targets, makers[0])
    split_paths = set()
    for path, module in modules.items():
        if path in named and isinstance(module, kinds.Parts):
            split_paths.add(path)
            named |= {f"{path}.{name}" for name in module.names}
    return [path for path in modules if path in named and path not in split_paths]


def _match_kind(
    modules: Mapping[str, nn.Module],
    only_linear: bool,
    makers: Sequence[ParameterizationCallable],
) -> list[str]:
    """Return the paths of all layers that every method wraps."""
    methods = [method_of(maker) for maker in makers]
    output_embeddings = _output_embeddings(modules[""])
    rescaled = rescaled_layers(modules)

    def fits(module: nn.Module) -> bool:
        plain = innermost(module)
        if only_linear and not isinstance(plain, kinds.LINEAR):
            return False
        return all(method.wraps(plain) for method in methods) and not kinds.unsupported(plain)

    return [
        path
        for path, module in modules.items()
        if id(module) not in output_embeddings and path not in rescaled and fits(module)
    ]


def _match_expression(modules: Mapping[str, nn.Module], expression: str) -> set[str]:
    try:
        return {path for path in modules if path and re.fullmatch(expression, path)}
    except re.error as error:
        raise UserError(f"targets={expression!r} is not a regular expression: {error}.") from None


def _match_names(
    modules: Mapping[str, nn.Module], names: Sequence[str], maker: ParameterizationCallable
) -> set[str]:
    matched: set[str] = set()
    for name in names:
        with_name = [path for path in modules if ends_in(path, name)]
        if not with_name:
            for weight in left_out_weights(modules):
                if ends_in(weight.path, name):
                    raise UserError(f"{name!r} names {weight.path}, {weight.reason}.")
            raise UserError(_no_match(modules, [name], (), maker))
        matched.update(with_name)
    return matched


def _match_excluded(modules: Mapping[str, nn.Module], exclude: str | Sequence[str]) -> list[str]:
    """Return the paths that `exclude` names, of layers or of whole parts of the model.

    Raises:
        ValueError: for an entry that names nothing.
    """
    matched: list[str] = []
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        paths = _match_entry(modules, entry)
        if not paths:
            known = {last_name(path) for path in modules if path}
            raise UserError(
                f"exclude={entry!r} names nothing in this model.{did_you_mean(entry, known)}"
            )
        matched += paths
    return matched


def _match_entry(modules: Mapping[str, nn.Module], entry: str) -> list[str]:
    try:
        return [
            path for path in modules if path and (ends_in(path, entry) or re.fullmatch(entry, path))
        ]
    except re.error as error:
        raise UserError(f"exclude={entry!r} is not a regular expression: {error}.") from None


def _output_embeddings(model: nn.Module) -> frozenset[int]:
    """Return the ids of the output embeddings of a model.

    "all" and "all-linear" leave them out, because a wrapper on a tied head breaks its tie. Every
    module is asked, because the language model may be an attribute of the adapted one.
    """
    heads = set()
    for module in plain_modules(model):
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if head is not None:
            heads.add(id(head))
    return frozenset(heads)


def _no_match(
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    maker: ParameterizationCallable,
) -> str:
    """Return the error for targets that match no layer: what would fit in this model."""
    method = method_of(maker)
    linear = bool(set(method.accepts) & set(kinds.LINEAR))
    if linear:
        wrapped_kinds, keyword = "linear layers", "all-linear"
        fits: Callable[[nn.Module], bool] = _is_linear
    else:
        wrapped_kinds, keyword = f"what {method.__name__} wraps ({method.wraps_what()})", "all"
        fits = method.wraps

    endings = _fitting_endings(modules, fits)
    wanted = targets if isinstance(targets, str) else ", ".join(targets)
    if not endings:
        kind = wrapped_kinds.removesuffix("s")
        return f"No layer matches targets={wanted!r}: this model has no {kind} at all."
    present = f"{wrapped_kinds} here end in {some(endings)}"
    if exclude:
        return f"targets={wanted!r} less exclude={exclude!r} leaves no layer; {present}."
    if isinstance(targets, str) and targets in endings:
        hint = (
            " A string is a regular expression over whole paths; "
            f"for the last component write [{targets}]."
        )
    else:
        hint = did_you_mean(last_name(wanted), endings)
    return f"No layer matches targets={wanted!r}; {present}, or say {keyword!r}.{hint}"


def _fitting_endings(
    modules: Mapping[str, nn.Module], fits: Callable[[nn.Module], bool]
) -> list[str]:
    """Return the last components of the paths of all layers that fit, in the order of the model."""
    output_embeddings = _output_embeddings(modules[""])
    fitting = [
        path
        for path, module in modules.items()
        if path and fits(innermost(module)) and id(module) not in output_embeddings
    ]
    return list(dict.fromkeys(map(last_name, fitting)))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, kinds.LINEAR)
