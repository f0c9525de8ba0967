"""Optimizers that know the adapters of a model: one file an optimizer.

The registry holds what this folder defines and what users subclass.
"""

from adaptrank.optimizers.fitting_methods import optimizer_pair, summary
from adaptrank.optimizers.lora_plus import apply_lora_plus, closing_factors
from adaptrank.optimizers.model_optimizer import (
    OPTIMIZERS,
    ModelOptimizer,
    bind,
    exempt_from_decay,
)
from adaptrank.optimizers.pair_optimizer import PairOptimizer

OPTIMIZERS.import_folder(__name__, __path__)


def __getattr__(name: str) -> type[ModelOptimizer]:
    """Find an optimizer by its class name, so that there is no second list to keep."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "OPTIMIZERS",
    "ModelOptimizer",
    "PairOptimizer",
    "apply_lora_plus",
    "bind",
    "closing_factors",
    "exempt_from_decay",
    "optimizer_pair",
    "summary",
]
