"""Contents of a checkpoint of an adapted module: trained tensors and the random state.

The backbone is left out. The ranks need no entry, because they are the shapes of the tensors.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank._errors import ListedError
from adaptrank.parameterizations import Parameterization


def select_trained(module: nn.Module, trained_whole: Iterable[str]) -> dict[str, Tensor]:
    """Select the part of `module.state_dict()` that belongs to wrappers or trains whole.

    Args:
        module: the module that is checkpointed.
        trained_whole: keys of tensors that train outside of wrappers.
    """
    whole = set(trained_whole)
    prefixes = [
        f"{path}."
        for path, submodule in module.named_modules()
        if isinstance(submodule, Parameterization)
    ]
    return {
        key: value
        for key, value in module.state_dict().items()
        if key in whole or _belongs_to_wrapper(key, prefixes)
    }


def _belongs_to_wrapper(key: str, prefixes: list[str]) -> bool:
    """Tell whether a tensor is one of a wrapper's own, and not of the layer inside it."""
    return any(
        key.startswith(prefix) and not key.startswith(f"{prefix}base.") for prefix in prefixes
    )


def check_same_keys(
    expected: Mapping[str, Tensor], stored: Mapping[str, Tensor], differences: Sequence[str] = ()
) -> None:
    """Raise unless a checkpoint holds exactly the expected tensors.

    Args:
        expected: trained tensors of this run.
        stored: trained tensors in the checkpoint.
        differences: how the two models differ, as clauses.
    Raises:
        ListedError: if a key is missing or unexpected.
    """
    listed = f": {'; '.join(differences)}" if differences else ""
    missing, unexpected = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    for problem, keys in (("has no", missing), ("has an unexpected", unexpected)):
        if keys:
            raise ListedError(
                f"The checkpoint {problem} {min(keys)} ({len(keys)} such). It was saved under "
                f"other adapters than this configuration has{listed}. Resume with the run's own "
                "config.yaml."
            )


def random_state() -> dict[str, Any]:
    """Return the state of PyTorch's global random number generators, of the CPU and of CUDA."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of `random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
