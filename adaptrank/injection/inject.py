"""Find layers, freeze the model, wrap them: the only file that edits someone else's model."""

import difflib
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError, UserTypeError
from adaptrank.axes import RankAxis, generator, rank_axes
from adaptrank.parameterizations import (
    Parameterization,
    named_layers,
    replace_layer,
    replace_layers,
    wrapped_layers,
    wrappers,
)

Model = TypeVar("Model", bound=nn.Module)

ParameterizationCallable = Callable[[nn.Module], Parameterization]
"""A parameterization that still lacks its layer: a class, a partial of one, or any function of the layer."""


def adapt(
    model: Model,
    targets: str | Sequence[str] = "all-linear",
    parameterization: ParameterizationCallable | Sequence[ParameterizationCallable] = (),
    *,
    exclude: str | Sequence[str] = (),
    name: str = "default",
    train_modules: Sequence[str] = (),
    rank_pattern: Mapping[str, int | Mapping[str, int]] | None = None,
    split_fused: bool | Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> Model:
    """Freeze `model` and wrap the layers that `targets` names; returns the same model.

    Calling it again with the same arguments changes nothing. What was matched is in `describe(model)`.

    Args:
        model: any module; its own class need not be known.
        targets: "all-linear" (linear layers, output embeddings left out); "all" (whatever the method wraps: norms, attention,
            convolutions); a regular expression that matches whole paths; or a list of last components of paths, such as
            ["q_proj", "v_proj"].
        parameterization: what to wrap with; of a sequence the first is innermost.
        exclude: layers or whole parts of the model to leave alone: regular expressions, or last components of paths.
        name: of the adapter; several adapters on one layer need several names.
        train_modules: paths, or last components of paths, of modules to train whole: a new classifier, say.
        rank_pattern: sizes to start from, axis key, path, last component or regular expression -> units, or {axis: units}.
            The scale of a method stays that of its `rank` argument.
        split_fused: treat the parts of a fused projection as layers of their own: GPT-2's `c_attn` becomes `c_attn.q`, `.k`
            and `.v`. None does so where the method reads the spectrum or the blocks of a weight. A mapping says which layers
            have which equal parts: {"c_attn": ["q", "k", "v"]}.
        seed: of what growing to a size of `rank_pattern` draws.
    Raises:
        ValueError: if nothing matches, a name is unknown, or a layer already carries this adapter in another form.
        TypeError: if a matched layer is of a kind the method cannot wrap.
    """
    makers = [parameterization] if callable(parameterization) else list(parameterization)
    if not makers:
        raise UserError(
            "adapt() needs a parameterization, such as parameterization=partial(LoRA, rank=8)."
        )
    if getattr(model, "_adaptrank_merged", None) is not None:
        raise UserError(
            "This model is merged, with its originals kept; unmerge() it before it gets further adapters."
        )
    extra = find_modules(model, train_modules)
    fused, whole = _split_fused(model, makers, split_fused)
    with undone_on_error(model, fused):
        modules = named_layers(model)
        return _adapt(
            model, modules, fused, whole, extra, targets, makers, exclude, name, rank_pattern, seed
        )


@contextmanager
def undone_on_error(model: nn.Module, fused: Mapping[kinds.Parts, nn.Module]) -> Iterator[None]:
    """After an exception the model has the very layers and flags it had on the way in, and split layers are whole again.

    Args:
        model: in which layers are wrapped; nothing is frozen or wrapped yet, but `fused` is split.
        fused: {the parts: the layer they came from}, of the layers that were split for this.
    """
    before = named_layers(model)
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    trains |= {p: p.requires_grad for layer in fused.values() for p in layer.parameters()}
    try:
        yield
    except BaseException:
        for path, layer in named_layers(model).items():
            if layer is not before.get(
                path, layer
            ):  # a part of a layer that was split has no place in what was
                replace_layer(model, layer, before[path])
        for parts, layer in fused.items():
            replace_layer(model, parts, layer)
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
        raise


def _adapt(
    model: Model,
    modules: Mapping[str, nn.Module],
    fused: Mapping[kinds.Parts, nn.Module],
    whole: Mapping[str, str],
    extra: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    makers: Sequence[ParameterizationCallable],
    exclude: str | Sequence[str],
    name: str,
    rank_pattern: Mapping[str, int | Mapping[str, int]] | None,
    seed: int,
) -> Model:
    # An earlier entry's adapters and modules go on training; all else is frozen.
    trained = (
        {id(p) for p in model.parameters() if p.requires_grad} if wrapped_layers(model) else set()
    )

    paths = [
        path
        for path in _match(modules, targets, makers, _left_out(model))
        if not any(path == p or path.startswith(f"{p}.") for p in extra)
    ]
    if exclude:
        left_out = _excluded(modules, exclude)
        paths = [
            path
            for path in paths
            if not any(path == p or path.startswith(f"{p}.") for p in left_out)
        ]
    if not paths:
        raise UserError(_no_match(modules, targets, exclude, makers[0]))
    if "" in paths:
        raise UserError("The model is itself a layer; wrap it directly, as in LoRA(layer, rank=8).")
    for path in paths:
        if path in whole:
            raise UserError(
                f"{path} {whole[path]}, so that its parts are no layers of their own; say split_fused=False."
            )
    for parts, layer in fused.items():
        # All were split, so that the parts could be named; those that nothing names are joined again.
        if not any(modules[path] in parts.plain for path in paths):
            replace_layer(model, parts, layer)

    built = {path: _wrap(path, modules[path], makers, name) for path in paths}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    wraps = {path: layer for path, layer in built.items() if layer is not None}
    replace_layers(model, {modules[path]: layer for path, layer in wraps.items()})
    _tie(wraps, name)
    for module in extra.values():
        module.requires_grad_(True)
    if (
        rank_pattern and wraps
    ):  # sizes to start from: a second call must not undo what an allocator did
        fresh = {id(w) for layer in wraps.values() for w in layer.nest if w.name == name}
        axes = {
            k: a
            for k, a in rank_axes(model).items()
            if any(id(member) in fresh for member, _ in a.members)
        }
        _resize_by_pattern(model, axes, rank_pattern, seed)
    return model


def describe(model: nn.Module) -> str:
    """What was wrapped: a line for each kind of layer (last component of the path), its method and its count."""
    kinds: Counter[tuple[str, str]] = Counter()
    for path, layer in wrapped_layers(model).items():
        nest = " on ".join(type(wrapper).__name__ for wrapper in reversed(layer.nest))
        kinds[path.rsplit(".", 1)[-1] or type(layer.innermost).__name__, nest] += 1
    width = max((len(kind) for kind, _ in kinds), default=0)
    return "\n".join(f"{kind:{width}}  {count:3} x {nest}" for (kind, nest), count in kinds.items())


def set_enabled(model: nn.Module, enabled: bool | str | Iterable[str] = True) -> None:
    """Switch adapters by flags: all on, all off, or exactly those of the given names.

    Raises:
        ValueError: for a name no wrapper has.
    """
    if not isinstance(enabled, bool):
        enabled = [enabled] if isinstance(enabled, str) else list(enabled)
        _check_names(model, enabled)
    for wrapper in wrappers(model):
        wrapper.enabled = enabled if isinstance(enabled, bool) else wrapper.name in enabled


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """All adapters off for a moment: within, every layer is its frozen base. What was on is on again afterwards.

    Raises:
        ValueError: if the model is merged: its layers have the change in them.
    """
    if getattr(model, "_adaptrank_merged", None) is not None:
        raise UserError(
            "This model is merged, and its adapters cannot be switched off; unmerge() it first."
        )
    before = [(wrapper, wrapper.enabled) for wrapper in wrappers(model)]
    try:
        set_enabled(model, False)
        yield
    finally:
        for wrapper, enabled in before:
            wrapper.enabled = enabled


@contextmanager
def select_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """One adapter for each row of a batch: row i runs with the adapter `names[i]` alone, or with none where that is None.

    Of those that are switched on. Works for whatever wraps a layer; a module that is wrapped whole (a prefix) refuses. Where
    activations are recomputed (gradient checkpointing), the backward pass belongs inside as well.

    Raises:
        ValueError: for a name no wrapper has, or an adapter on a layer that the model reads instead of calling; within, for a
            batch of another size.
    """
    _check_names(model, [name for name in names if name is not None])
    if path := next(
        (p for p, layer in wrapped_layers(model).items() if kinds.is_read(layer.innermost)), None
    ):
        raise UserError(
            f"{path}: nn.MultiheadAttention reads this weight instead of calling the layer, for all rows at once; adapt with "
            f"exclude=[{_last(path)!r}] to select rows."
        )
    before = [(wrapper, wrapper.rows) for wrapper in wrappers(model)]
    hooks = [wrapper.call_it() for wrapper, _ in before]
    try:
        for wrapper, _ in before:
            rows = [row for row, name in enumerate(names) if name == wrapper.name]
            device = next(wrapper.parameters()).device
            wrapper.rows = (torch.tensor(rows, dtype=torch.long, device=device), len(names))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for wrapper, rows_before in before:
            wrapper.rows = rows_before


def delete_adapter(model: Model, name: str = "default") -> Model:
    """Take every wrapper of that name off its layer; the others stay as they are. Returns the same model.

    A fused layer whose parts carry no wrapper any more is one layer again. Modules trained whole are not touched.

    Raises:
        ValueError: for a name no wrapper has.
    """
    _check_names(model, [name])
    layers = wrapped_layers(model)
    if "" in layers:
        raise UserError(
            "The model is itself a wrapper, and nothing holds it; what it wraps is its `base`."
        )
    for layer in layers.values():
        outermost: nn.Module = layer.innermost
        for wrapper in layer.nest:
            if wrapper.name != name:
                if wrapper.base is not outermost:
                    wrapper.base = outermost
                    wrapper.refresh()
                outermost = wrapper
        if outermost is not layer:
            replace_layer(model, layer, outermost)
    join_fused(model)
    return model


def _check_names(model: nn.Module, names: Iterable[str]) -> None:
    known = list(dict.fromkeys(wrapper.name for wrapper in wrappers(model)))
    for wanted in names:
        if wanted not in known:
            raise UserError(
                f"No adapter is called {wanted!r}; there are {_some(known)}.{_nearest(wanted, known)}"
            )


def apply_rank_pattern(
    model: nn.Module, pattern: Mapping[str, int | Mapping[str, int]], seed: int = 0
) -> None:
    """Give axes the sizes of a pattern; the most specific key wins: axis key, path, last component, regular expression.

    Raises:
        ValueError: for a key that names no axis, or a size outside an axis' limits.
    """
    _resize_by_pattern(model, rank_axes(model), pattern, seed)


def _resize_by_pattern(
    model: nn.Module,
    axes: Mapping[str, RankAxis],
    pattern: Mapping[str, int | Mapping[str, int]],
    seed: int,
) -> None:
    paths = {
        id(wrapper): path for path, layer in wrapped_layers(model).items() for wrapper in layer.nest
    }
    used: set[str] = set()
    for key, axis in axes.items():
        size = _pattern_size(key, paths[id(axis.members[0][0])], pattern, used)
        if size is None or size == len(axis):
            continue
        least, largest = axis.limits()
        if size < least or (largest is not None and size > largest):
            raise UserError(
                f"rank_pattern asks {key} for {size} units; it holds {least} to {largest or 'any number'}."
            )
        kept = min(size, len(axis))
        axis.resize(range(kept), size - kept, generator(seed, key, 0))
    for key in pattern:
        if key not in used:
            layers = [paths[id(axis.members[0][0])] for axis in axes.values()]
            known = {*axes, *layers, *map(_last, layers)}
            raise UserError(
                f"rank_pattern names {key!r}, which is no axis of this model; axes here: {_some(axes)}.{_nearest(key, known)}"
            )


def _pattern_size(
    key: str, path: str, pattern: Mapping[str, int | Mapping[str, int]], used: set[str]
) -> int | None:
    own, axis = key.rsplit(
        ":", 1
    )  # of two adapters with an axis of one name, `own` has the position in the nest
    matches = [entry for entry in dict.fromkeys((key, own, path, _last(path))) if entry in pattern]
    matches += [entry for entry in pattern if entry not in matches and _fullmatch(entry, path)]
    used.update(matches)
    for entry in matches:
        given = pattern[entry]
        sizes = given if isinstance(given, Mapping) else {axis: given}
        if axis in sizes:
            size = sizes[axis]
            if not isinstance(size, int) or isinstance(size, bool):
                raise UserError(
                    f"rank_pattern gives {entry!r} the size {size!r}; a size is a whole number of units."
                )
            return size
        raise UserError(
            f"rank_pattern gives {entry!r} sizes of {_some(sizes)}, and {key} is the axis there: {axis!r}."
        )
    return None


def _fullmatch(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:  # an axis key or a path that happens to be no expression
        return False


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


# ---- matching


def _innermost(module: nn.Module) -> nn.Module:
    return module.innermost if isinstance(module, Parameterization) else module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, kinds.LINEAR)


def _left_out(model: nn.Module) -> frozenset[int]:
    """The output embeddings, which "all-linear" leaves alone: a wrapper on a tied head breaks its tie."""
    heads = set()
    for module in model.modules():  # the model may be an attribute of the one that is adapted
        get = (
            None
            if isinstance(module, Parameterization)
            else getattr(module, "get_output_embeddings", None)
        )
        head = get() if callable(get) else None
        if head is not None:
            heads.add(id(head))
    return frozenset(heads)


def _method(maker: ParameterizationCallable) -> type[Parameterization]:
    """The class that a maker makes, as far as one can tell."""
    while isinstance(maker, functools.partial):
        # What a YAML file names comes as partial(call, build, cls, ...).
        given = (
            one for one in maker.args if isinstance(one, type) and issubclass(one, Parameterization)
        )
        maker = next(given, maker.func)
    maker = getattr(maker, "parameterization", maker)
    return (
        maker
        if isinstance(maker, type) and issubclass(maker, Parameterization)
        else Parameterization
    )


def _match(
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    makers: Sequence[ParameterizationCallable],
    left_out: frozenset[int],
) -> list[str]:
    """Paths that the targets name, in the order of the model; of a layer that is split those of its parts."""
    if targets in ("all", "all-linear"):
        methods = [_method(maker) for maker in makers]

        def fits(module: nn.Module) -> bool:
            plain = _innermost(module)
            kind = targets == "all" or isinstance(plain, kinds.LINEAR)
            return (
                kind
                and all(method.wraps(plain) for method in methods)
                and not kinds.unsupported(plain)
            )

        return [
            path for path, module in modules.items() if id(module) not in left_out and fits(module)
        ]
    found: set[str] = set()
    if isinstance(targets, str):
        try:
            found |= {path for path in modules if path and re.fullmatch(targets, path)}
        except re.error as error:
            raise UserError(f"targets={targets!r} is not a regular expression: {error}.") from None
    else:
        for target in targets:
            ends = [path for path in modules if path == target or path.endswith(f".{target}")]
            if not ends:
                raise UserError(_no_match(modules, [target], (), makers[0]))
            found.update(ends)
    split = {
        path: module.names
        for path, module in modules.items()
        if isinstance(module, kinds.Parts) and path in found
    }
    found |= {f"{path}.{name}" for path, names in split.items() for name in names}
    return [path for path in modules if path in found and path not in split]


def _excluded(modules: Mapping[str, nn.Module], exclude: str | Sequence[str]) -> list[str]:
    """Paths that `exclude` names, of layers or of whole parts of the model; every entry must name something."""
    found: list[str] = []
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        try:
            here = [
                path
                for path in modules
                if path
                and (path == entry or path.endswith(f".{entry}") or re.fullmatch(entry, path))
            ]
        except re.error as error:
            raise UserError(f"exclude={entry!r} is not a regular expression: {error}.") from None
        if not here:
            endings = {path.rsplit(".", 1)[-1] for path in modules if path}
            raise UserError(
                f"exclude={entry!r} names nothing in this model.{_nearest(entry, endings)}"
            )
        found += here
    return found


def _no_match(
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    maker: ParameterizationCallable,
) -> str:
    method, left_out = _method(maker), _left_out(modules[""])
    linear = bool(set(method.accepts) & set(kinds.LINEAR))
    what = "linear layers" if linear else f"what {method.__name__} wraps ({method.wraps_what()})"
    fits: Callable[[nn.Module], bool] = _is_linear if linear else method.wraps
    all_of_them = "all-linear" if linear else "all"
    fitting = [p for p, m in modules.items() if p and fits(_innermost(m)) and id(m) not in left_out]
    endings = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in fitting))
    wanted = targets if isinstance(targets, str) else ", ".join(targets)
    if not endings:
        return f"No layer matches targets={wanted!r}: this model has no {what.removesuffix('s')} at all."
    here = f"{what} here end in {_some(endings)}"
    if exclude:
        return f"targets={wanted!r} less exclude={exclude!r} leaves no layer; {here}."
    if isinstance(targets, str) and targets in endings:
        hint = f" A string is a regular expression over whole paths; for the last component write [{targets}]."
    else:
        hint = _nearest(wanted.rsplit(".", 1)[-1], endings)
    return f"No layer matches targets={wanted!r}; {here}, or say {all_of_them!r}.{hint}"


def find_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Path -> module, of the modules that the names mean: whole paths, or last components of paths.

    Raises:
        ValueError: for a name that no module has.
    """
    modules = named_layers(model)
    extra = {}
    for name in names:
        found = {
            path: m for path, m in modules.items() if path == name or path.endswith(f".{name}")
        }
        if not found:
            known = {path.rsplit(".", 1)[-1] for path in modules if path}
            raise UserError(
                f"train_modules names {name!r}, which this model does not have.{_nearest(name, known)}"
            )
        extra.update(found)
    return extra


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- wrapping


def _wrap(
    path: str, layer: nn.Module, makers: Sequence[ParameterizationCallable], name: str
) -> Parameterization | None:
    """The layer in its new wrappers, or None where it already carries exactly these."""
    before = layer.nest if isinstance(layer, Parameterization) else []
    carried = [w for w in before if w.name == name]
    was_training = layer.training
    # What is there already is compared with the same over the same: over itself it may not even be possible.
    wrapper = start = carried[0].base if carried else layer
    for maker in makers:
        try:
            wrapper = maker(wrapper)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path or 'the model'}: {error}") from error
        if not isinstance(wrapper, Parameterization):
            raise UserTypeError(
                f"A parameterization must return a wrapped layer; {maker} returned {type(wrapper).__name__}."
            )
    assert isinstance(wrapper, Parameterization)
    made = wrapper.nest[len(start.nest) if isinstance(start, Parameterization) else 0 :]
    for one in made:
        one.name = name
        if not one.mergeable:
            if kinds.is_read(one.innermost):
                raise UserTypeError(
                    f"{path}: nn.MultiheadAttention reads this weight instead of calling the layer, and {type(one).__name__} "
                    f"has none; exclude it."
                )
            one.call_it()
    if carried:
        if [(type(w), w.init_args) for w in made] == [(type(w), w.init_args) for w in carried]:
            return None
        have = " on ".join(type(w).__name__ for w in reversed(carried))
        raise UserError(
            f"{path} already carries adapter {name!r} ({have}); nest methods in one entry's list, or give this one another name."
        )
    return wrapper.train(was_training)


def _tie(layers: Mapping[str, Parameterization], name: str) -> None:
    """Tie the `shared` tensors of the new wrappers into every layer of one kind (last component) and shape.

    Wrappers of other names were tied, or not, when they were made: they have trained since, and they do not count as places.
    """
    first: dict[object, Parameterization] = {}
    for path, layer in layers.items():
        for position, wrapper in enumerate(w for w in layer.nest if w.name == name):
            if wrapper.shared:
                group = (
                    _last(path),
                    wrapper.shape,
                    position,
                    type(wrapper),
                    json.dumps(wrapper.init_args),
                )
                owner = first.setdefault(group, wrapper)
                for tensor in wrapper.shared:
                    setattr(wrapper, tensor, getattr(owner, tensor))


# ---- fused projections

_PARTS: Mapping[str, Sequence[str]] = {
    "c_attn": ("q", "k", "v"),
    "qkv": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
}
"""Last component of a path -> the equal parts that are stacked in its outputs, in their order."""


def _split_fused(
    model: nn.Module,
    makers: Sequence[ParameterizationCallable],
    split: bool | Mapping[str, Sequence[str]] | None,
) -> tuple[dict[kinds.Parts, nn.Module], dict[str, str]]:
    """Replace every fused layer by its parts; {the parts: the layer}, and {path: why not} of those that cannot be split."""
    if split is None:
        split = any(_method(maker).reads_blocks for maker in makers)
    if split is False:
        return {}, {}
    modules = named_layers(model)
    table = split if isinstance(split, Mapping) else _PARTS
    if isinstance(split, Mapping):
        for name in split:
            if not any(name in (path, _last(path)) for path in modules):
                raise UserError(
                    f"split_fused names {name!r}, which is no layer here.{_nearest(name, map(_last, modules))}"
                )
    made: dict[kinds.Parts, nn.Module] = {}
    whole: dict[str, str] = {}
    for path, layer in modules.items():
        parts, plain = table.get(path) or table.get(_last(path)), _innermost(layer)
        if parts is None or not isinstance(plain, kinds.LINEAR):
            continue
        m, n = kinds.shape(plain)
        if isinstance(split, Mapping) and m % len(parts):
            raise UserError(
                f"split_fused: {path} has {m} outputs, which are not {len(parts)} equal parts."
            )
        if not isinstance(split, Mapping) and (
            m % len(parts) or (_last(path) != "gate_up_proj" and m != len(parts) * n)
        ):
            continue
        if isinstance(layer, Parameterization):
            whole[path] = "carries an adapter as a whole"
        elif kinds.quantized(layer):
            whole[path] = "is quantized as a whole"
        else:
            made[kinds.Parts(layer, parts)] = layer
    for split_layer, layer in made.items():
        replace_layer(model, layer, split_layer)
    return made, whole


def split_at(model: nn.Module, parts: Mapping[str, Sequence[str]]) -> dict[kinds.Parts, nn.Module]:
    """Split the layers at these paths into parts of these names, unless they are so already; {the parts: the layer}.

    Raises:
        ValueError: if a path names no layer that can be split so.
    """
    made: dict[kinds.Parts, nn.Module] = {}
    modules = named_layers(model)
    for path, names in parts.items():
        layer = modules.get(path)
        if isinstance(layer, kinds.Parts) and layer.names == tuple(names):
            continue
        if not isinstance(layer, kinds.LINEAR) or kinds.shape(layer)[0] % len(names):
            carries = (
                "carries an adapter as a whole here"
                if isinstance(layer, Parameterization)
                else "is none here"
            )
            raise UserError(
                f"The adapter wraps the parts {', '.join(names)} of a linear layer {path}, which {carries}."
            )
        if kinds.quantized(layer):
            raise UserError(
                f"The adapter wraps the parts {', '.join(names)} of {path}, which is quantized as a whole here."
            )
        made[kinds.Parts(layer, names)] = layer
    for split, layer in made.items():
        replace_layer(model, layer, split)
    return made


def join_fused(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Put split layers together again where no part carries a wrapper any more; {the fused layer: its parts}."""
    joined: dict[nn.Module, nn.Module] = {}
    for split in [module for module in model.modules() if isinstance(module, kinds.Parts)]:
        if not wrapped_layers(split):
            fused = split.join()
            replace_layer(model, split, fused)
            joined[fused] = split
    return joined
