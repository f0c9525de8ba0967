"""Find the wrappers of a model, and replace layers in it."""

from collections.abc import Iterator, Mapping

from torch import nn

from adaptrank.parameterizations.base import Parameterization
from adaptrank.parameterizations.enclosing import enclosed


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return path before wrapping -> module, for every module of a model, in its order.

    A wrapped module is given by its outermost wrapper. A module that is used at several places is
    listed at the first one. Modules such as those of `torch.compile` and DataParallel have no path
    of their own: the module that they enclose has it.
    """
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        module = enclosed(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        modules[path] = module
        plain = module.innermost if isinstance(module, Parameterization) else module
        seen.add(id(plain))
        for name, child in plain.named_children():
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return modules


def wrapped_layers(model: nn.Module) -> dict[str, Parameterization]:
    """Return path before wrapping -> outermost wrapper, for each wrapped layer, in model order."""
    layers = named_layers(model).items()
    return {path: layer for path, layer in layers if isinstance(layer, Parameterization)}


def wrappers(model: nn.Module) -> list[Parameterization]:
    """Return every wrapper of a model in its order, the innermost of a nest first."""
    return [wrapper for layer in wrapped_layers(model).values() for wrapper in layer.nest]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of every wrapper of the model, a tied one once."""
    parameters: dict[int, nn.Parameter] = {}
    for wrapper in wrappers(model):
        for _, parameter in wrapper.own_parameters():
            parameters.setdefault(id(parameter), parameter)
    return list(parameters.values())


def plain_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module of a model but the wrappers and the modules of their own.

    The time does not depend on the number of adapters.
    """
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        plain = module.innermost if isinstance(module, Parameterization) else module
        if id(plain) in seen:
            continue
        seen.add(id(plain))
        yield plain
        waiting.extend(reversed([*plain.children()]))


def pretrained_part(model: nn.Module) -> nn.Module | None:
    """Return the outermost transformers model in a module, or None if it holds none."""
    candidates = plain_modules(model)
    return next((m for m in candidates if hasattr(type(m), "base_model_prefix")), None)


def plain_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter of a model but those of its wrappers. A tied one may come twice."""
    for module in plain_modules(model):
        yield from module.parameters(recurse=False)


def replace_layer(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` at every place where the model uses `old`."""
    replace_layers(model, {old: new})


def replace_layers(model: nn.Module, pairs: Mapping[nn.Module, nn.Module]) -> None:
    """Replace many layers, {old: new}, in one walk through the model."""
    # No wrapper is a parent: the layers of a nest are replaced together, by its outermost wrapper.
    for parent in list(plain_modules(model)):
        for name, child in list(parent._modules.items()):
            new = pairs.get(child) if child is not None else None
            if new is not None and parent is not new:
                setattr(parent, name, new)


def adapted_part(module: nn.Module) -> nn.Module:
    """Return the module that axis keys and adapter files count paths from.

    This is `module.backbone` if it holds all wrappers, and the module itself otherwise.
    """
    module = enclosed(module)
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return module
    holds_all = len(wrapped_layers(backbone)) == len(wrapped_layers(module))
    return backbone if holds_all else module
