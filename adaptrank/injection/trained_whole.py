"""Record the parameters outside of wrappers that train whole with an adapter, such as a new head.

Their flag `requires_grad` does not tell: a model is often frozen for evaluation before it is saved.
The record is an attribute of each module that owns such a parameter. So it follows the module into
copies and pickles, and goes with it.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from adaptrank.parameterizations import adapter_parameters, plain_modules

TRAINED = "_adaptrank_trained"
"""Attribute of a module: names of its own parameters that train whole."""


def record_trained(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Record that these parameters of a model train whole, under all their names."""
    ids = {id(parameter) for parameter in parameters}
    for module in plain_modules(model):
        names = {name for name, parameter in _own(module).items() if id(parameter) in ids}
        if names:
            vars(module)[TRAINED] = recorded_names(module) | names


def forget_trained(model: nn.Module, parameters: Iterable[Tensor] | None = None) -> None:
    """Remove parameters from the record of a model. None means all of them."""
    ids = None if parameters is None else {id(parameter) for parameter in parameters}
    for module in plain_modules(model):
        own = _own(module)
        kept = {
            name
            for name in recorded_names(module)
            if ids is not None and id(own.get(name)) not in ids
        }
        restore_names(module, frozenset(kept))


def recorded_names(module: nn.Module) -> frozenset[str]:
    """Return the names of a module's own parameters that the record has."""
    names: frozenset[str] = vars(module).get(TRAINED, frozenset())
    return names


def restore_names(module: nn.Module, names: frozenset[str]) -> None:
    """Give a module this record."""
    if names:
        vars(module)[TRAINED] = names
    else:
        vars(module).pop(TRAINED, None)


def trained_ids(model: nn.Module) -> frozenset[int]:
    """Return the ids of the parameters outside of wrappers that train, or are on the record."""
    in_wrappers = {id(parameter) for parameter in adapter_parameters(model)}
    ids = set()
    for module in plain_modules(model):
        recorded = recorded_names(module)
        for name, parameter in _own(module).items():
            if parameter.requires_grad or name in recorded:
                ids.add(id(parameter))
    return frozenset(ids - in_wrappers)


def _own(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the parameters of a module without those of its children, by name."""
    return {name: p for name, p in module._parameters.items() if p is not None}
