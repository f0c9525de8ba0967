"""Trainable changes of a frozen layer: one method, one file.

The registry holds what this folder defines and what users subclass.
"""

from adaptrank.parameterizations.base import (
    PARAMETERIZATIONS,
    Cost,
    Parameterization,
    on_example,
)
from adaptrank.parameterizations.capabilities import Capability
from adaptrank.parameterizations.enclosing import enclosed, plain_name
from adaptrank.parameterizations.factor_pair import FactorPair
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.indices import check_indices, is_index
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.merged_updates import MergedUpdates, insert_ledger
from adaptrank.parameterizations.module import ModuleWrapper
from adaptrank.parameterizations.starting import built_again, start_scale
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate
from adaptrank.parameterizations.traversal import (
    adapted_part,
    adapter_parameters,
    named_layers,
    plain_modules,
    plain_parameters,
    pretrained_part,
    replace_layer,
    replace_layers,
    wrapped_layers,
    wrappers,
)
from adaptrank.parameterizations.unmerged_saving import (
    CONFIG_FILE,
    COUNTS_AS_ADAPTED,
    HOW_TO_LOAD,
    TRAINER_WRITER,
    is_refused_by_from_pretrained,
    refused_by_from_pretrained,
)

PARAMETERIZATIONS.import_folder(__name__, __path__)


def __getattr__(name: str) -> type[Parameterization]:
    """Find a method by its class name, so that there is no second list to keep."""
    if name in PARAMETERIZATIONS:
        return PARAMETERIZATIONS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CONFIG_FILE",
    "COUNTS_AS_ADAPTED",
    "HOW_TO_LOAD",
    "PARAMETERIZATIONS",
    "TRAINER_WRITER",
    "Capability",
    "Cost",
    "FactorPair",
    "LowRankUpdate",
    "MergedUpdates",
    "ModuleWrapper",
    "Parameterization",
    "StudiedRate",
    "TensorKind",
    "adapted_part",
    "adapter_parameters",
    "built_again",
    "check_indices",
    "enclosed",
    "formula",
    "insert_ledger",
    "is_index",
    "is_refused_by_from_pretrained",
    "named_layers",
    "on_example",
    "plain_modules",
    "plain_name",
    "plain_parameters",
    "pretrained_part",
    "refused_by_from_pretrained",
    "replace_layer",
    "replace_layers",
    "start_scale",
    "wrapped_layers",
    "wrappers",
]
