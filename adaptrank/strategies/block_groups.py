"""The blocks of a transformer, as the groups of its adapted layers."""

from collections.abc import Collection, Iterable

from torch import nn

from adaptrank.parameterizations import Parameterization, named_layers


def group_by_block(model: nn.Module, paths: Iterable[str]) -> dict[str, list[str]]:
    """Return block -> paths of its adapted layers, in the order of the paths.

    A block is a member of a module list that holds further modules. Of lists within lists, the
    outermost block counts. A layer outside of all blocks is a block of its own.

    Args:
        model: the model that the paths are counted from.
        paths: paths of adapted layers.
    """
    blocks = _block_paths(model)
    grouped: dict[str, list[str]] = {}
    for path in paths:
        grouped.setdefault(_outermost_block(path, blocks), []).append(path)
    return grouped


def _block_paths(model: nn.Module) -> set[str]:
    """Return the paths of the members of module lists that hold further modules."""
    modules = named_layers(model)
    blocks = set()
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        plain = module.innermost if isinstance(module, Parameterization) else module
        is_member = isinstance(parent, nn.ModuleList) and not isinstance(plain, nn.ModuleList)
        if is_member and any(True for _ in plain.children()):
            blocks.add(path)
    return blocks


def _outermost_block(path: str, blocks: Collection[str]) -> str:
    """Return the shortest beginning of a path that is a block, or the path itself."""
    names = path.split(".")
    for count in range(1, len(names)):
        beginning = ".".join(names[:count])
        if beginning in blocks:
            return beginning
    return path
