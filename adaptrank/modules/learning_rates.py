"""Learning rates of parts of what trains, in place of the optimizer's own.

A key names tensors in one of these ways. The first that fits a tensor decides its rate:

1. `LoRA.B`, a tensor of a method, or the path of a module that trains whole.
2. `LoRA`, a method: a member of a nest by its class. Or the last component of such a path.
3. `style`, an adapter by its name. Or `head`: what trains outside of the pretrained body.
4. `scales`, a kind of tensor (`TensorKind`). Or `modules`: all that trains outside of wrappers.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from torch import nn

from adaptrank._errors import UserError, did_you_mean, some
from adaptrank._options import NOT_NEGATIVE, check_number
from adaptrank.parameterizations import (
    Parameterization,
    StudiedRate,
    plain_name,
    pretrained_part,
    wrappers,
)

STUDIED: Literal["studied"] = "studied"
"""Value of `learning_rates` that gives each method the rate which its study chose."""
HEAD = "head"
"""Key of what trains outside of the pretrained body, such as a classifier."""
STUDIED_HEAD = StudiedRate(0.05, "docs/results/study_head_rate_banking77.md")
"""Rate of a fresh head of 77 classes. Of four rates it and 0.1 are the best, and within chance of
each other (docs/results/study_head_rate_tasks.md)."""
MODULES = "modules"
"""Key of all that trains outside of wrappers."""


class Names(NamedTuple):
    """Keys that a trained tensor answers to, the most specific first. An empty one is no key.

    Args:
        tensor: the tensor of a method, or the path of the module that trains whole.
        method: class of the wrapper, or the last component of that path.
        adapter: name of the adapter, or `head`.
        kind: kind of tensor, or `modules`.
    """

    tensor: str
    method: str
    adapter: str
    kind: str


Rates = dict[str, float] | Literal["studied"]
"""The option `learning_rates`, checked: the rate of each key, or `STUDIED`."""


def check_rates(learning_rates: Any) -> Rates:
    """Check the option `learning_rates` without the model, and return it.

    Raises:
        UserError: naming the key, its value and what fits.
    """
    if learning_rates is None:
        return {}
    if learning_rates == STUDIED:
        return STUDIED
    if not isinstance(learning_rates, Mapping):
        raise UserError(
            f"learning_rates={learning_rates!r} makes no sense. Give names and their rates, such "
            f"as {{HyperAdapt: 0.01, LoRA: 0.001}}, or studied."
        )
    rates: dict[str, float] = {}
    for key, rate in _flat(learning_rates):
        if key in rates:
            raise UserError(f"learning_rates gives {key} two rates. Keep one.")
        rates[key] = _read_rate(key, rate)
    return rates


def _flat(learning_rates: Mapping[Any, Any], method: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys and their rates. {LoRA: {B: 0.1}} is another way to write {LoRA.B: 0.1}."""
    for key, rate in learning_rates.items():
        if not isinstance(key, str) or not key:
            raise UserError(
                f"learning_rates: {key!r} is no name. Name a method, one of its tensors, a kind of "
                f"tensor, an adapter or a module, such as LoRA or LoRA.B."
            )
        if isinstance(rate, Mapping) and rate and not method:
            yield from _flat(rate, f"{key}.")
        else:
            yield f"{method}{key}", rate


def _read_rate(key: str, rate: Any) -> float:
    """Return a rate as a number. PyYAML reads 1e-3 as a text."""
    if isinstance(rate, str):
        with suppress(ValueError):
            rate = float(rate)
    check_number(f"learning_rates: {key}", rate, NOT_NEGATIVE)
    return float(rate)


def rates_of_model(
    model: nn.Module, learning_rates: Any, head: StudiedRate | None = None
) -> dict[str, float]:
    """Return the rate of each key of the option `learning_rates` for a model.

    Args:
        model: the adapted model.
        learning_rates: the option. "studied" gives each method the rate that its study chose, and
            the optimizer's own rate to a method without a study.
        head: rate that "studied" gives to the head, None if it has been trained or not studied.

    Raises:
        UserError: if the option makes no sense, or if no method of the model has a study.
    """
    rates = check_rates(learning_rates)
    if not isinstance(rates, str):
        return rates
    present = [type(wrapper) for wrapper in wrappers(model) if _trains(wrapper)]
    # A class that derives from a method was not studied itself.
    studied = {method: vars(method).get("studied_rate") for method in present}
    chosen = {method.__name__: found.rate for method, found in studied.items() if found}
    if not chosen:
        names = ", ".join(dict.fromkeys(method.__name__ for method in present)) or "no method"
        raise UserError(
            f"learning_rates: studied needs a method with a study of its rates, and this model has "
            f"{names}. Give rates, such as {{LoRA: 0.001}}, or leave it out."
        )
    if head is not None and head_parameters(model):
        chosen[HEAD] = head.rate
    return chosen


def head_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that train outside of the pretrained body."""
    return {name for name, ways in trained_names(model).items() if ways.adapter == HEAD}


def _trains(wrapper: Parameterization) -> bool:
    return any(parameter.requires_grad for _, parameter in wrapper.own_parameters())


def match_rates(model: nn.Module, learning_rates: Mapping[str, float]) -> dict[int, str]:
    """Return the key that decides the rate of each tensor, {id of the parameter: key}.

    A tensor that no key names is left out. It has the optimizer's own rate.

    Raises:
        UserError: if a key names nothing that trains, has two meanings here, or decides nothing.
    """
    if not learning_rates:
        return {}
    names = trained_names(model)
    for key in learning_rates:
        _check_key(key, names.values())
    deciding = {}
    for parameter, ways in names.items():
        for way in ways:
            if way in learning_rates:
                deciding[parameter] = way
                break
    for key in learning_rates:
        if key not in deciding.values():
            others = {deciding[parameter] for parameter, ways in names.items() if key in ways}
            raise UserError(
                f"learning_rates: {key!r} decides nothing here, because more specific keys name "
                f"all of its tensors: {some(sorted(others), 6)}. Leave {key!r} out."
            )
    return deciding


def _check_key(key: str, names: Collection[Names]) -> None:
    """Refuse a key that names nothing, or different tensors in two ways."""
    meanings = set()
    for level in range(len(Names._fields)):
        named = frozenset(position for position, ways in enumerate(names) if ways[level] == key)
        if named:
            meanings.add(named)
    if not meanings:
        known = known_keys(names)
        raise UserError(
            f"learning_rates: {key!r} names nothing that trains here.{did_you_mean(key, known)} "
            f"There are {some(known, 24)}."
        )
    if len(meanings) > 1:
        raise UserError(
            f"learning_rates: {key!r} names different tensors in two ways, such as a method and an "
            f"adapter of that name. Give the adapter another name, or name single tensors."
        )


def check_ratio(model: nn.Module, deciding: Mapping[int, str], closing: Collection[int]) -> None:
    """Refuse a rate of a single tensor that a LoRA+ ratio would multiply.

    Args:
        model: the adapted model.
        deciding: id of a parameter -> key, as `match_rates` returns it.
        closing: ids of the parameters whose rate the ratio multiplies.

    Raises:
        UserError: naming the tensor.
    """
    names = trained_names(model) if closing and deciding else {}
    for parameter in closing:
        key = deciding.get(parameter)
        if key is not None and key == names[parameter].tensor:
            raise UserError(
                f"learning_rates gives {key} a rate, which lora_plus_ratio would multiply. Leave "
                f"one of them out."
            )


def known_keys(names: Iterable[Names]) -> list[str]:
    """Return all keys that name something: methods, kinds and adapters first, then tensors."""
    keys: dict[str, None] = {}
    for level in ("method", "kind", "adapter", "tensor"):
        keys.update(dict.fromkeys(getattr(ways, level) for ways in names))
    keys.pop("", None)
    return list(keys)


def trained_names(model: nn.Module) -> dict[int, Names]:
    """Return the keys that each trained tensor answers to, {id of the parameter: keys}.

    A tied tensor answers to the keys of the first layer that has it.
    """
    names: dict[int, Names] = {}
    in_wrappers: set[int] = set()
    for wrapper in wrappers(model):
        method = type(wrapper).__name__
        for name, parameter in wrapper.own_parameters():
            in_wrappers.add(id(parameter))
            if parameter.requires_grad:
                ways = Names(f"{method}.{name}", method, wrapper.name, wrapper.kind_of(name))
                names.setdefault(id(parameter), ways)
    body = _parameters_of_body(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in in_wrappers:
            path = plain_name(model, _module_that_trains(model, name))
            is_head = body is not None and id(parameter) not in body
            last = path.rpartition(".")[2]
            names[id(parameter)] = Names(path, last, HEAD if is_head else "", MODULES)
    return names


def _parameters_of_body(model: nn.Module) -> set[int] | None:
    """Return the ids of the parameters of the pretrained body, or None if it is no part."""
    pretrained = pretrained_part(model)
    name: str = getattr(pretrained, "base_model_prefix", "")
    body = getattr(pretrained, name) if name and hasattr(pretrained, name) else None
    if not isinstance(body, nn.Module) or body is pretrained:
        return None
    return {id(parameter) for parameter in body.parameters()}


def _module_that_trains(model: nn.Module, name: str) -> str:
    """Return the path of the outermost module around a tensor of which all parameters train.

    Rows of added tokens train in an embedding whose other rows do not: it is the path of the
    embedding. A tensor of the model itself stands for itself.
    """
    layer, is_parametrized, _ = name.partition(".parametrizations.")
    if is_parametrized:
        return layer
    parts = name.split(".")[:-1]
    for length in range(1, len(parts)):
        path = ".".join(parts[:length])
        if all(parameter.requires_grad for parameter in model.get_submodule(path).parameters()):
            return path
    return ".".join(parts) or name
