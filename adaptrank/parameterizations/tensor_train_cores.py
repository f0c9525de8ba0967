"""Tensor trains of a matrix: modes, cores, and the contraction of one side; shared by the methods that hold such trains."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from adaptrank._errors import UserError

MODE = 16
"""Modes up to this size are split no further."""


def modes_of(size: int) -> list[int]:
    """Two to four factors of a size, ascending: the fewest of which none is above 16, else those whose largest is least.

    A prime is one mode. Small modes belong to the ends of a train, where they bound the bonds anyway.
    """
    found = [
        min(splits, key=lambda s: (s[-1], -s[0]))
        for k in (2, 3, 4)
        if (splits := list(_splits(size, k, 2)))
    ]
    fits = [split for split in found if split[-1] <= MODE]
    return fits[0] if fits else min(found, key=lambda s: (s[-1], -s[0]), default=[size])


def _splits(size: int, k: int, least: int) -> Iterator[list[int]]:
    """Every way to write a size as k ascending factors, none below `least`."""
    if k == 1:
        if size >= least:
            yield [size]
        return
    for factor in range(least, math.isqrt(size) + 1):
        if size % factor == 0:
            yield from ([factor, *rest] for rest in _splits(size // factor, k - 1, factor))


def check_modes(modes: Sequence[int] | None, size: int, what: str) -> list[int]:
    """The given modes, or automatic ones.

    Raises:
        ValueError: if they do not multiply to the size.
    """
    if modes is None:
        return modes_of(size)
    if not modes or min(modes) < 1 or math.prod(modes) != size:
        raise UserError(
            f"{what}={list(modes)} does not multiply to {size}; use {modes_of(size)}, or leave it out."
        )
    return list(modes)


def bonds(modes: Sequence[int]) -> list[int]:
    """The largest size that each bond can use: the product of the modes on either side of it, whichever is less."""
    return [min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes))]


def axes(modes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """A rank axis for each bond: "a2" is between cores A_2 and A_3, and the later core closes."""
    return {
        f"{name.lower()}{k}": {f"{name}_{k}": 2, f"{name}_{k + 1}": 0}
        for name, sizes in modes.items()
        for k in range(1, len(sizes))
    }


def core_shapes(modes: Sequence[int], tt_rank: int) -> list[tuple[int, int, int]]:
    """(r_{k-1}, n_k, r_k) of each core, with bonds of `tt_rank` where they can use it."""
    inner = [1, *(min(tt_rank, most) for most in bonds(modes)), 1]
    return list(zip(inner[:-1], modes, inner[1:], strict=True))


def draw(core: Tensor, size: int, length: int) -> None:
    """N(0, 1) r_k^(-1/2) sigma^(1/d) in place, as in LoRETTA's code: an entry of the matrix then has deviation sigma = size^(-1/2).

    Args:
        core: (r_{k-1}, n_k, r_k).
        size: rows plus columns of the matrix.
        length: number d of cores.
    """
    torch.nn.init.normal_(core, std=core.shape[-1] ** -0.5 * size ** (-0.5 / length))


def unrounded(core: Tensor) -> AbstractContextManager[object]:
    """Within, cores are multiplied in their own dtype: autocast would round once for each core of a train."""
    device = core.device.type
    available = torch.amp.is_autocast_available(device)  # the meta device knows none
    return torch.autocast(device, enabled=False) if available else nullcontext()


def left(cores: Sequence[Tensor]) -> Tensor:
    """Cores (1, n_1, r_1) ... (r_{k-1}, n_k, r_k) -> (n_1 ... n_k, r_k)."""
    matrix = cores[0].flatten(0, 1)
    with unrounded(matrix):
        for core in cores[1:]:
            matrix = (matrix @ core.flatten(1)).reshape(-1, core.shape[-1])
    return matrix


def right(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r_0, n_1, r_1) ... (r_{k-1}, n_k, 1) -> (r_0, n_1 ... n_k)."""
    matrix = cores[-1].flatten(1)
    with unrounded(matrix):
        for core in reversed(cores[:-1]):
            matrix = (core.flatten(0, 1) @ matrix).reshape(core.shape[0], -1)
    return matrix


def dense(cores: Sequence[Tensor], rows: int) -> Tensor:
    """The whole train as a matrix (rows, columns), core by core: its definition."""
    tensor = cores[0]
    for core in cores[1:]:
        tensor = torch.tensordot(tensor, core, dims=1)
    return tensor.reshape(rows, -1)


def flops_left(cores: Sequence[Tensor]) -> int:
    """Of `left`."""
    total, rows = 0, cores[0].shape[1]
    for core in cores[1:]:
        r, n, s = core.shape
        total += 2 * rows * r * n * s
        rows *= n
    return total


def flops_right(cores: Sequence[Tensor]) -> int:
    """Of `right`."""
    return flops_left([core.permute(2, 1, 0) for core in reversed(cores)])
