"""Choose the weak units that become copies of strong ones. Pure."""

from collections.abc import Mapping, Sequence

import torch

from adaptrank.allocation.plans import Scores, ranked
from adaptrank.axes import RankAxis, generator, natural

Kind = tuple[int, ...]
Pair = tuple[int, int]


def kinds_of(axis: RankAxis) -> list[Kind]:
    """Return the kind of each unit: its entries in the integer buffers of the axis.

    A kind never changes. It is, for example, the part of the layer that the unit belongs to. Most
    axes have no such buffer, and then all units are of one kind, ().
    """
    buffers = []
    for slot in axis.slots():
        if not slot.tensor.is_floating_point():
            moved = slot.tensor.movedim(slot.dim, 0)
            buffers.append(moved.reshape(len(axis), moved.shape[1:].numel()).tolist())
    kinds = []
    for unit in range(len(axis)):
        numbers: list[int] = []
        for rows_of_units in buffers:
            numbers += rows_of_units[unit]
        kinds.append(tuple(numbers))
    return kinds


def copies(
    scores: Scores,
    kept: float,
    seed: int,
    step: int,
    kinds: Mapping[str, Sequence[Kind]] | None = None,
) -> dict[str, list[Pair]]:
    """Return axis -> (source, target) units. Each target becomes a copy of its source.

    The units of all axes are sorted by weight. Those after the point where the cumulated weight
    passes `kept` times the sum are targets, but never more than half of an axis, the weakest
    first. The sources are the strongest units of the same axis, paired with the targets by a
    random permutation. All processes draw the same permutation.

    Args:
        scores: axis -> weights, (units,).
        kept: share of the total weight that is kept, in (0, 1].
        seed: seed of the permutations, with the axis and the step.
        step: optimizer step.
        kinds: axis -> kind of each unit. A unit never becomes a copy of another kind. None if
            all units are of one kind.
    """
    surplus = _after_share(scores, kept)
    result = {}
    for axis, units in surplus.items():
        random = generator(seed, axis, step)
        strongest_first = ranked(scores[axis])
        kind_of: Sequence[Kind]
        kind_of = [()] * len(strongest_first) if kinds is None else kinds[axis]
        pairs: list[Pair] = []
        for kind in sorted(set(kind_of)):
            alike = [unit for unit in strongest_first if kind_of[unit] == kind]
            count = min(len(units.intersection(alike)), len(alike) // 2)
            if count == 0:
                continue
            weakest = alike[len(alike) - count :]
            permutation = torch.randperm(count, generator=random).tolist()
            pairs += [(alike[i], weakest[j]) for i, j in enumerate(permutation)]
        if pairs:
            result[axis] = pairs
    return result


def _after_share(scores: Scores, kept: float) -> dict[str, set[int]]:
    """Return axis -> units after the point where the cumulated weight passes the share `kept`."""
    entries: list[tuple[float, str, int]] = []
    for axis in sorted(scores, key=natural):
        entries += [(weight, axis, unit) for unit, weight in enumerate(scores[axis].tolist())]
    # The sort is stable: ties stay in natural order of the axes, then by unit.
    entries.sort(key=lambda entry: -entry[0])
    limit = kept * sum(weight for weight, _, _ in entries)
    cumulated = 0.0
    surplus: dict[str, set[int]] = {axis: set() for axis in scores}
    for weight, axis, unit in entries:
        cumulated += weight
        if cumulated > limit * (1 + 1e-6):
            surplus[axis].add(unit)
    return surplus
