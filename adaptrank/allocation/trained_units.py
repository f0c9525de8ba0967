"""Trained units at the start of a run, which a rank initializer must not discard in silence.

The criterion is the function of the model. A fresh wrapper computes what its base does, and so a
rank initializer may resize it and set its tensors. A trained one does not. Another start of its
units would leave neither the base nor the trained adapter, and without some of its units it would
be another adapter.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.axes import RankAxis
from adaptrank.parameterizations import Parameterization, built_again

if TYPE_CHECKING:
    from adaptrank.allocation.participant import Participant

OwnStart = Mapping[str, list[Tensor]]
"""Axis key -> closing factors as a rank initializer has set them."""


def check_fresh(participant: "Participant", axes: Mapping[str, RankAxis], own: OwnStart) -> None:
    """Check that no axis is trained whose tensors a rank initializer would set.

    Args:
        participant: the rank initializer.
        axes: axes of the run.
        own: its own start in a run that ended before its first step. It may be set again.
    Raises:
        UserError: names the adapter and an axis.
    """
    for key, axis in axes.items():
        if not _equals(axis, own.get(key)) and (layer := trained_layer(axis)) is not None:
            raise UserError(
                f"{participant.label} would start the trained units of adapter {layer.name!r} anew "
                f"at {key}, and what they have learned would be lost; {_advice(participant)}."
            )


def check_removed(
    participant: "Participant",
    axes: Mapping[str, RankAxis],
    ranks: Mapping[str, int],
    own: OwnStart,
) -> None:
    """Check that the ranks of a rank initializer remove no unit that changes the function.

    Args:
        participant: the rank initializer.
        axes: axes of the run.
        ranks: axis key -> chosen number of units. The first units of an axis stay.
        own: its own start, as in `check_fresh`.
    Raises:
        UserError: names the adapter, an axis, and the two numbers of units.
    """
    for key, size in ranks.items():
        axis = axes[key]
        removed = range(size, len(axis))
        if not removed or _equals(axis, own.get(key)) or not _are_open(axis, removed):
            continue
        if (layer := trained_layer(axis)) is not None:
            raise UserError(
                f"{participant.label} would keep {size} of {len(axis)} units of adapter "
                f"{layer.name!r} at {key}, and what the others have learned would be lost; "
                f"{_advice(participant)}."
            )


def _advice(participant: "Participant") -> str:
    return (
        f"leave {participant.label} out to train on, resume from a checkpoint to go on with its "
        f"own run, or start from a fresh adapter"
    )


def trained_layer(axis: RankAxis) -> Parameterization | None:
    """Return a layer of an axis that started at its base and has left it, or None."""
    layers = (layer for layer, _ in axis.members)
    return next((layer for layer in layers if layer.starts_at_base and _has_left(layer)), None)


def _has_left(layer: Parameterization) -> bool:
    """Return whether a layer that started at its base computes something else now.

    A tensor that the constructor starts at zero holds a layer at its base. In most methods it is a
    closing factor. Where no closing factor is zero, the constructor is asked.
    """
    for axis in layer.axes:
        closing = getattr(layer, layer.axis_tensors(axis)[-1][0])
        if not closing.any():
            return False
    fresh = dict(built_again(layer, torch.Generator()).own_parameters())
    started_at_zero = [name for name, tensor in fresh.items() if not tensor.any()]
    present = dict(layer.own_parameters())
    return any(bool(present[name].any()) for name in started_at_zero)


def own_start(axes: Mapping[str, RankAxis]) -> OwnStart:
    """Return the closing factors of all axes that are not zero, as copies."""
    copies = {}
    for key, axis in axes.items():
        factors = [slot.tensor.detach() for slot in axis.closing()]
        if any(bool(factor.any()) for factor in factors):
            copies[key] = [factor.clone() for factor in factors]
    return copies


def _equals(axis: RankAxis, start: list[Tensor] | None) -> bool:
    """Return whether the closing factors of an axis are those of a start."""
    if start is None:
        return False
    present = [slot.tensor.detach() for slot in axis.closing()]
    pairs = zip(present, start, strict=True)
    return all(
        tensor.device == other.device and torch.equal(tensor, other) for tensor, other in pairs
    )


def _are_open(axis: RankAxis, units: Iterable[int]) -> bool:
    """Return whether the closing factor of one of these units is not zero."""
    units = list(units)
    return any(bool(slot.select(units).any()) for slot in axis.closing())
