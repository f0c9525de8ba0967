"""Modules that were trained whole, named so that PEFT's `modules_to_save` means just these.

PEFT copies every module whose path ends in one of the names, and then loads all tensors of the
copy: each of them has to be in the file. For classification of texts and words it adds two
names by itself. It adapts no layer whose path has such a name as a component.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.injection import lies_in
from adaptrank.parameterizations import Parameterization

ADDED_NAMES = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""PEFT's task -> the names that PEFT adds to `modules_to_save` by itself."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that are never called, and that PEFT does not copy."""


@dataclass(frozen=True)
class WholeModules:
    """Modules that PEFT saves whole.

    Args:
        names: value of `modules_to_save`.
        tensors: name in the plain model -> tensor, of all modules that the names mean.
        task: PEFT's task, or None where the names that it adds would keep a layer from its adapter.
    """

    names: Sequence[str]
    tensors: Mapping[str, Tensor]
    task: str | None


def whole_modules(
    model: nn.Module, trained: Collection[str], adapted: Collection[str], task: str | None
) -> WholeModules:
    """Return the modules that hold trained parameters, with names that PEFT resolves to them.

    Args:
        model: the model with its wrappers.
        trained: names of the parameters that were trained outside of wrappers.
        adapted: paths of adapted layers in the plain model.
        task: PEFT's task, or None.

    Raises:
        UserError: if PEFT has no place for a parameter.
    """
    modules = dict(_plain_modules(model))
    chosen = {_holder(name, modules, trained, adapted) for name in trained}
    names = [_shortest_name(path, modules, chosen) for path in sorted(chosen)]
    added = [name for name in ADDED_NAMES.get(task or "", ()) if _named(modules, [name])]
    if any(_is_left_out(path, added, modules) for path in adapted):
        added, task = [], None
    # A name that PEFT adds may mean a whole of which only a part was trained.
    covered = _named(modules, added)
    names = [name for name in names if not _all_within(_named(modules, [name]), covered)]
    names = sorted({*names, *added})
    saved = _named(modules, names)
    _check_saved(saved, modules, names)
    for path in adapted:
        if _is_left_out(path, names, modules):
            raise UserError(
                f"{path} is adapted, and PEFT would save it whole: its modules_to_save "
                f"{', '.join(names)} means it as well. Merge instead."
            )
    tensors: dict[str, Tensor] = {}
    for path in saved:
        state = modules[path].state_dict()
        tensors |= {f"{path}.{name}": value for name, value in state.items()}
    return WholeModules(names, tensors, task)


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the plain model below its wrappers, at each place of its use."""

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        plain = module.innermost if isinstance(module, Parameterization) else module
        yield path, plain
        for name, child in plain._modules.items():
            if child is not None:
                yield from visit(child, f"{path}.{name}" if path else name)

    return visit(model, "")


def _holder(
    parameter: str,
    modules: Mapping[str, nn.Module],
    trained: Collection[str],
    adapted: Collection[str],
) -> str:
    """Return the path of the largest module that is trained whole and holds a parameter.

    It is the module that owns the parameter if no larger one is trained whole.
    """
    path = _parent(parameter)
    while path and isinstance(modules.get(path), _CONTAINERS):
        path = _parent(path)
    if path not in modules or not path or any(lies_in(other, [path]) for other in adapted):
        raise UserError(
            f"{parameter} was trained, and PEFT saves no part of a module that is adapted or is "
            "the model itself. Merge instead."
        )
    largest = path
    while path := _parent(path):
        names = [f"{path}.{name}" for name, _ in modules[path].named_parameters()]
        is_adapted = any(lies_in(other, [path]) for other in adapted)
        if is_adapted or not all(name in trained for name in names):
            break
        if not isinstance(modules[path], _CONTAINERS):
            largest = path
    return largest


def _shortest_name(path: str, modules: Mapping[str, nn.Module], chosen: Collection[str]) -> str:
    """Return the shortest end of a path that means chosen modules only, or the path itself."""
    components = path.split(".")
    for count in range(1, len(components)):
        name = ".".join(components[-count:])
        if all(other in chosen for other in _named(modules, [name])):
            return name
    return path


def _named(modules: Mapping[str, nn.Module], names: Collection[str]) -> list[str]:
    """Return the paths that `modules_to_save` means, as PEFT reads it."""
    return [path for path in modules if path and path.endswith(tuple(names))]


def _is_left_out(path: str, names: Collection[str], modules: Mapping[str, nn.Module]) -> bool:
    """Return whether PEFT adapts no layer at a path because of names in `modules_to_save`."""
    is_component = any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)
    return is_component or lies_in(path, _named(modules, names))


def _check_saved(
    saved: Collection[str], modules: Mapping[str, nn.Module], names: Collection[str]
) -> None:
    """Refuse names that mean modules which PEFT cannot copy."""
    for path in saved:
        others = [other for other in saved if other != path]
        if isinstance(modules[path], _CONTAINERS) or lies_in(path, others):
            raise UserError(
                f"PEFT finds modules to save by the ends of their paths, and "
                f"{', '.join(names)} means {path} as well, which it cannot save. Merge instead."
            )


def _all_within(paths: Collection[str], parents: Collection[str]) -> bool:
    """Return whether all paths lie in these paths, and none is one of them."""
    return all(path not in parents and lies_in(path, parents) for path in paths)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
