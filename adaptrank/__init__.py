"""adaptrank: adaptive-rank, parameter-efficient fine-tuning on PyTorch Lightning.

Importing the package is cheap: each public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adaptrank import _moved

if TYPE_CHECKING:
    from adaptrank.allocation import ALLOCATORS, Allocator, Policy, RankInitializer
    from adaptrank.artifacts import load_adapter, merge, save_adapter, unmerge
    from adaptrank.axes import fit_ranks, rank_axes
    from adaptrank.backbones import load_backbone
    from adaptrank.composition import compose
    from adaptrank.injection import (
        adapt,
        delete_adapter,
        describe,
        disabled,
        select_rows,
        set_enabled,
    )
    from adaptrank.modules import Adapter, parameter_groups
    from adaptrank.optimizers import OPTIMIZERS
    from adaptrank.parameterizations import PARAMETERIZATIONS, Parameterization
    from adaptrank.reports import report
    from adaptrank.training import compile_blocks

__version__ = "0.2.0"

_moved.install()

_HOMES = {
    "ALLOCATORS": "allocation",
    "OPTIMIZERS": "optimizers",
    "Adapter": "modules",
    "Allocator": "allocation",
    "PARAMETERIZATIONS": "parameterizations",
    "Parameterization": "parameterizations",
    "Policy": "allocation",
    "RankInitializer": "allocation",
    "adapt": "injection",
    "compile_blocks": "training",
    "compose": "composition",
    "delete_adapter": "injection",
    "describe": "injection",
    "disabled": "injection",
    "fit_ranks": "axes",
    "load_adapter": "artifacts",
    "load_backbone": "backbones",
    "merge": "artifacts",
    "parameter_groups": "modules",
    "rank_axes": "axes",
    "report": "reports",
    "save_adapter": "artifacts",
    "select_rows": "injection",
    "set_enabled": "injection",
    "unmerge": "artifacts",
}
__all__ = [
    "ALLOCATORS",
    "OPTIMIZERS",
    "PARAMETERIZATIONS",
    "Adapter",
    "Allocator",
    "Parameterization",
    "Policy",
    "RankInitializer",
    "adapt",
    "compile_blocks",
    "compose",
    "delete_adapter",
    "describe",
    "disabled",
    "fit_ranks",
    "load_adapter",
    "load_backbone",
    "merge",
    "parameter_groups",
    "rank_axes",
    "report",
    "save_adapter",
    "select_rows",
    "set_enabled",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adaptrank' has no attribute {name!r}")
    return getattr(import_module(f"adaptrank.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
