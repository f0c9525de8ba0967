"""The change that an adapter has before the first round, as after a warm start."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptrank.parameterizations import Parameterization
from adaptrank.strategies.ledger import change_of, merge_into_ledger


@torch.no_grad()
def merge_present_changes(layers: Mapping[str, Parameterization]) -> None:
    """Merge the change of every layer that has one, before a strategy replaces its wrappers.

    Fresh wrappers change nothing. A saved adapter that a run starts from does.
    """
    for outermost in layers.values():
        if _has_change(outermost):
            merge_into_ledger(outermost)


def _has_change(outermost: Parameterization) -> bool:
    """Return whether the live wrappers of a layer change its weight."""
    change = change_of(outermost)
    if isinstance(change, Tensor):
        return bool(change.any())
    U, V = change
    return bool(U.any()) and bool(V.any())
