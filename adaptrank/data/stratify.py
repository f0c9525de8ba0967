"""Share rows out so that each class has the same share of them in both parts."""

import math
from collections.abc import Hashable, Sequence

from adaptrank.data.seeding import seeded_random


def stratified_sample(groups: Sequence[Hashable], count: int, *key: object) -> list[int]:
    """Draw indices of rows, from each group in proportion to its size, by largest remainders.

    A group of n of N rows gives n count / N of them, rounded so that the sum is `count`. No group
    is drawn whole. So a group of one row gives none, and fewer than `count` are drawn where all
    groups are that small.

    Args:
        groups: (N,) group of each row.
        count: number of rows to draw.
        key: key of the random generator.

    Returns:
        The indices, sorted.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    shares = [count * len(indices) / len(groups) for indices in members.values()]
    most = [len(indices) - 1 for indices in members.values()]
    sizes = [min(math.floor(share), limit) for share, limit in zip(shares, most, strict=True)]
    # The larger the missing part of a share, the earlier it gets one more. Ties go by the order.
    while sum(sizes) < count and sizes != most:
        missing = [share - size for share, size in zip(shares, sizes, strict=True)]
        open_groups = [place for place, size in enumerate(sizes) if size < most[place]]
        sizes[max(open_groups, key=lambda place: missing[place])] += 1
    drawn: list[int] = []
    for place, (indices, size) in enumerate(zip(members.values(), sizes, strict=True)):
        drawn += seeded_random("stratify", place, *key).sample(indices, size)
    return sorted(drawn)


def some_of_each(groups: Sequence[Hashable], count: int, *key: object) -> list[int]:
    """Draw `count` rows of each group, or all rows of a group that has fewer.

    Args:
        groups: (N,) group of each row.
        count: number of rows of a group.
        key: key of the random generator. The rows of a group do not depend on other groups.

    Returns:
        The indices, sorted.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    drawn: list[int] = []
    for group, indices in members.items():
        random = seeded_random("each", group, *key)
        drawn += random.sample(indices, min(count, len(indices)))
    return sorted(drawn)


def rarest(label_sets: Sequence[Sequence[Hashable]]) -> list[Hashable]:
    """Return the group of each row with several labels: the one of its labels that is rarest.

    Rows without a label are a group of their own, None.
    """
    counts: dict[Hashable, int] = {}
    for labels in label_sets:
        for label in labels:
            counts[label] = counts.get(label, 0) + 1
    return [min(labels, key=lambda label: counts[label], default=None) for labels in label_sets]
