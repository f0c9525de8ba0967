"""Axes that take part in a run: those of adapters that are switched on and that train."""

import logging
from collections.abc import Collection, Mapping, Sequence

import torch

from adaptrank._errors import some
from adaptrank.axes import RankAxis, optimized_tensors

log = logging.getLogger("adaptrank")


def taking_part(
    axes: Mapping[str, RankAxis],
    optimizers: Sequence[torch.optim.Optimizer],
    begun_with: Collection[str] = (),
) -> dict[str, RankAxis]:
    """Return the axes that train in a run.

    All layers of an adapter may be switched off, and an adapter may be in no optimizer. Its units
    then have no gradient, or nothing moves them, so that no score could tell what they are worth.

    Args:
        axes: axes whose tensors take gradients.
        optimizers: optimizers of the run. If there are none yet, all tensors count as optimized.
        begun_with: keys of the axes that the run of a checkpoint began with. They stay.
    """
    optimized = {id(tensor) for tensor in optimized_tensors(optimizers)}
    kept = {}
    for key, axis in axes.items():
        moves = not optimizers or any(id(tensor) in optimized for tensor in axis.tensors())
        if key in begun_with or (axis.enabled and moves):
            kept[key] = axis
    return kept


def say_left_out(owner: str, left_out: Mapping[str, RankAxis]) -> None:
    """Log which adapters an allocator leaves as they are."""
    if left_out:
        log.info(
            "%s leaves %d axes of %s as they are, because nothing trains them in this run.",
            owner,
            len(left_out),
            some(adapter_names(left_out)),
        )


def why_none(left_out: Mapping[str, RankAxis]) -> str:
    """Return why no axis takes part, and what to type, as a clause without its end."""
    is_on = {key: axis for key, axis in left_out.items() if axis.enabled}
    if not is_on:
        names = adapter_names(left_out)
        if len(names) == 1:
            return (
                f"the adapter {names[0]!r} is switched off; switch it on by "
                f"adaptrank.set_enabled(model, {names[0]!r})"
            )
        return (
            f"the adapters {some(map(repr, names))} are switched off; switch on the one to train, "
            f"as in adaptrank.set_enabled(model, {names[0]!r})"
        )
    return (
        f"no optimizer holds a tensor of the adapter {some(map(repr, adapter_names(is_on)))}; make "
        f"the optimizer after adapt(), as in torch.optim.AdamW([p for p in model.parameters() if "
        f"p.requires_grad])"
    )


def adapter_names(axes: Mapping[str, RankAxis]) -> list[str]:
    """Return the names of the adapters that have these axes, each once."""
    return list(dict.fromkeys(name for axis in axes.values() for name in axis.adapters))
