"""What changes in a weight. One method, one file; the registry is what the folder defines and what users subclass."""

from adaptrank.parameterizations.base import (
    PARAMETERIZATIONS,
    Cost,
    Parameterization,
    adapted_part,
    adapter_parameters,
    named_layers,
    on_example,
    replace_layer,
    replace_layers,
    wrapped_layers,
    wrappers,
)

PARAMETERIZATIONS.import_folder(__name__, __path__)


def __getattr__(name: str) -> type[Parameterization]:
    """`from adaptrank.parameterizations import LoRA`, with no second list to keep."""
    if name in PARAMETERIZATIONS:
        return PARAMETERIZATIONS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PARAMETERIZATIONS",
    "Cost",
    "Parameterization",
    "adapted_part",
    "adapter_parameters",
    "named_layers",
    "on_example",
    "replace_layer",
    "replace_layers",
    "wrapped_layers",
    "wrappers",
]
