"""The merge ledger: what earlier rounds have merged, as a wrapper between layer and adapter."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.parameterizations import (
    MergedUpdates,
    Parameterization,
    insert_ledger,
    wrapped_layers,
)


def insert_ledgers(model: nn.Module) -> None:
    """Put an empty `MergedUpdates` under the wrappers of each layer that has none.

    An empty one changes nothing, so this may be done before a checkpoint is loaded, whose shapes
    say how much was merged.

    Raises:
        UserError: if the wrappers of a layer cannot be merged and started anew.
    """
    layers = wrapped_layers(model)
    for path, outermost in layers.items():
        check_restartable(path, live_wrappers(outermost))
    for outermost in layers.values():
        insert_ledger(outermost)


def ledger_of(outermost: Parameterization) -> MergedUpdates:
    """Return the ledger of a layer, which `insert_ledgers` has put there."""
    return cast(MergedUpdates, outermost.nest[0])


def live_wrappers(outermost: Parameterization) -> list[Parameterization]:
    """Return the wrappers of a layer that train, innermost first: all but its ledger."""
    return [wrapper for wrapper in outermost.nest if not isinstance(wrapper, MergedUpdates)]


def check_restartable(path: str, live: Sequence[Parameterization]) -> None:
    """Refuse wrappers whose change cannot be merged, or that do not start at the merged weight.

    Raises:
        UserError: names the layer and the method.
    """
    plain = Parameterization
    if len({wrapper.name for wrapper in live}) > 1:
        raise UserError(
            f"{path} carries several adapters, and a training strategy merges one; adapt the model "
            f"once."
        )
    for wrapper in live:
        kind = type(wrapper)
        reason = ""
        if not wrapper.mergeable:
            reason = "it has no dense weight"
        elif kind.trained_bias is not plain.trained_bias or kind.merged is not plain.merged:
            reason = "it trains more than the weight"
        elif not wrapper.starts_at_base:
            reason = "with these arguments it does not start at the weight of its layer"
        if reason:
            raise UserError(
                f"{path}: a training strategy merges {kind.__name__} and starts it anew, but "
                f"{reason}; use a method such as LoRA, or train without the strategy."
            )


@torch.no_grad()
def merge_into_ledger(outermost: Parameterization, factor: float = 1.0) -> None:
    """Add the change of the live wrappers of a layer to its ledger, times a factor.

    The live wrappers stay as they are. Starting them anew completes the merge.
    """
    ledger = ledger_of(outermost)
    change = change_of(outermost)
    if isinstance(change, tuple):
        U, V = change
        ledger.add((factor * U, V))
    else:
        ledger.add(factor * change)
    for wrapper in outermost.nest[1:]:
        wrapper.renew()


@torch.no_grad()
def change_of(outermost: Parameterization) -> Tensor | tuple[Tensor, Tensor]:
    """Return the change by the live wrappers of a layer, (m, n), or two factors of it.

    Factors are (U (m, k), V (k, n)) with the change U V. They are there if every wrapper has them.
    """
    pairs = []
    for wrapper in live_wrappers(outermost):
        if not wrapper.enabled or wrapper.idle:
            continue
        with wrapper.reading_gates():
            factors = wrapper.factors()
        if factors is None:
            return outermost.dense().detach() - ledger_of(outermost).dense()
        pairs.append((factors[0].detach(), factors[1].detach()))
    m, n = outermost.shape
    empty = ledger_of(outermost).A
    Us = [U.to(empty) for U, _ in pairs] or [empty.new_zeros(m, 0)]
    Vs = [V.to(empty) for _, V in pairs] or [empty.new_zeros(0, n)]
    return torch.cat(Us, 1), torch.cat(Vs)


def stored_numbers(layers: Mapping[str, Parameterization]) -> int:
    """Return how many numbers the ledgers of a model hold."""
    ledgers = [ledger_of(outermost) for outermost in layers.values()]
    return sum(tensor.numel() for ledger in ledgers for tensor in ledger.own_tensors().values())
