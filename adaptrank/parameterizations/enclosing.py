"""See through modules that enclose a model and leave its layers as they are.

`torch.compile`, DataParallel and their like hold the model in an attribute, whose name would stand
in every path. Files and axis keys count paths from the model itself.
"""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

ENCLOSED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
"""Attributes in which torch.compile, activation checkpointing, FSDP and Fabric hold a module."""

_ATTRIBUTES = frozenset({*ENCLOSED, "module"})


def enclosed_name(module: nn.Module) -> str | None:
    """Return the attribute in which an enclosing module holds the model, or None for any other."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return "module"
    return next((name for name in ENCLOSED if name in module._modules), None)


def enclosed(module: nn.Module) -> nn.Module:
    """Return the model inside of enclosing modules, or the module itself."""
    while (name := enclosed_name(module)) is not None:
        inner = module._modules[name]
        assert inner is not None
        module = inner
    return module


def plain_name(model: nn.Module, name: str) -> str:
    """Return the name of a module or a tensor without the attributes of enclosing modules.

    Args:
        model: the module that the name counts from.
        name: as `model.named_modules()` or `model.named_parameters()` gives it.
    """
    parts = name.split(".")
    # The name of a wrapper among hundreds has hundreds of parts.
    if _ATTRIBUTES.isdisjoint(parts):
        return name
    kept = []
    module: nn.Module | None = model
    for part in parts:
        if module is None or enclosed_name(module) != part:
            kept.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)
