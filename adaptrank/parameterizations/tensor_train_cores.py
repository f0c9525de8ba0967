"""Tensor trains of a matrix: modes, cores, and the contraction of one side."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.parameterizations.wrapper import Wrapper

MODE = 16
"""Size up to which a mode is not split further."""


def modes_of(size: int) -> list[int]:
    """Return two to four factors of a size, ascending.

    They are the fewest factors of which none is above 16. If there are no such factors, they are
    those whose largest is least. A prime is one mode. Small modes belong to the ends of a train,
    where they bound the bonds anyway.
    """
    candidates = []
    for k in (2, 3, 4):
        splits = list(_splits(size, k, 2))
        if splits:
            candidates.append(min(splits, key=_evenness))
    for split in candidates:
        if split[-1] <= MODE:
            return split
    return min(candidates, key=_evenness, default=[size])


def _evenness(split: list[int]) -> tuple[int, int]:
    """Return a sort key of ascending factors: the least largest first, then the largest least."""
    return split[-1], -split[0]


def _splits(size: int, k: int, least: int) -> Iterator[list[int]]:
    """Yield every way to write a size as k ascending factors, none below `least`."""
    if k == 1:
        if size >= least:
            yield [size]
        return
    for factor in range(least, math.isqrt(size) + 1):
        if size % factor == 0:
            yield from ([factor, *rest] for rest in _splits(size // factor, k - 1, factor))


def check_modes(modes: Sequence[int] | None, size: int, argument: str) -> list[int]:
    """Return the given modes, or automatic ones.

    Raises:
        ValueError: if they do not multiply to the size.
    """
    if modes is None:
        return modes_of(size)
    if not modes or min(modes) < 1 or math.prod(modes) != size:
        raise UserError(
            f"{argument}={list(modes)} does not multiply to {size}; use {modes_of(size)}, or "
            f"leave it out."
        )
    return list(modes)


def bonds(modes: Sequence[int]) -> list[int]:
    """Return the largest size that each bond can use.

    It is the product of the modes on either side of the bond, whichever is less.
    """
    return [min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes))]


def axes(modes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Return a rank axis for each bond.

    "a2" is between cores A_2 and A_3. The later core closes it.
    """
    return {
        f"{name.lower()}{k}": {f"{name}_{k}": 2, f"{name}_{k + 1}": 0}
        for name, sizes in modes.items()
        for k in range(1, len(sizes))
    }


def max_bond(modes: Mapping[str, Sequence[int]], axis: str) -> int:
    """Return the largest size of the bond that is this axis."""
    return bonds(modes[axis[0].upper()])[int(axis[1:]) - 1]


def gated_cores(wrapper: Wrapper, name: str, count: int) -> list[Tensor]:
    """Return the cores of a train, first to last, with their gates multiplied in."""
    return [wrapper.gated(f"{name}_{k}") for k in range(1, count + 1)]


def core_shapes(modes: Sequence[int], tt_rank: int) -> list[tuple[int, int, int]]:
    """Return (r_{k-1}, n_k, r_k) of each core, with bonds of `tt_rank` where they can use it."""
    inner = [1, *(min(tt_rank, most) for most in bonds(modes)), 1]
    return list(zip(inner[:-1], modes, inner[1:], strict=True))


def draw(core: Tensor, size: int, length: int) -> None:
    """Draw a core from N(0, 1) r_k^(-1/2) sigma^(1/d) in place, as in LoRETTA's code.

    An entry of the matrix then has standard deviation sigma = size^(-1/2).

    Args:
        core: (r_{k-1}, n_k, r_k).
        size: rows plus columns of the matrix.
        length: number d of cores.
    """
    torch.nn.init.normal_(core, std=core.shape[-1] ** -0.5 * size ** (-0.5 / length))


def unrounded(core: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off within the context. It would round once for each core of a train."""
    device = core.device.type
    # The meta device has no autocast.
    can_autocast = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if can_autocast else nullcontext()


def left(cores: Sequence[Tensor]) -> Tensor:
    """Contract cores (1, n_1, r_1) ... (r_{k-1}, n_k, r_k) to (n_1 ... n_k, r_k)."""
    matrix = cores[0].flatten(0, 1)
    with unrounded(matrix):
        for core in cores[1:]:
            rows = len(matrix) * core.shape[1]
            matrix = (matrix @ core.flatten(1)).reshape(rows, core.shape[-1])
    return matrix


def right(cores: Sequence[Tensor]) -> Tensor:
    """Contract cores (r_0, n_1, r_1) ... (r_{k-1}, n_k, 1) to (r_0, n_1 ... n_k)."""
    matrix = cores[-1].flatten(1)
    with unrounded(matrix):
        for core in reversed(cores[:-1]):
            columns = core.shape[1] * matrix.shape[1]
            matrix = (core.flatten(0, 1) @ matrix).reshape(core.shape[0], columns)
    return matrix


def dense(cores: Sequence[Tensor], rows: int) -> Tensor:
    """Return the whole train as a matrix (rows, columns), core by core: its definition."""
    tensor = cores[0]
    for core in cores[1:]:
        tensor = torch.tensordot(tensor, core, dims=1)
    return tensor.reshape(rows, -1)


def flops_left(cores: Sequence[Tensor]) -> int:
    """Return the operations of `left`."""
    total, rows = 0, cores[0].shape[1]
    for core in cores[1:]:
        r, n, s = core.shape
        total += 2 * rows * r * n * s
        rows *= n
    return total


def flops_right(cores: Sequence[Tensor]) -> int:
    """Return the operations of `right`."""
    return flops_left([core.permute(2, 1, 0) for core in reversed(cores)])
