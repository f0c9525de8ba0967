"""Frozen random rows, computed where they are used, with the same bits on every device.

Number c of a row is the top 24 bits of (x_c xor h) * k modulo 2^32, a whole number from -2^23 to
2^23 - 1. x_c is a hash of c, the same in all rows. The key (h, k) of a row is a hash of the
seed, the stream, the matrix and the row, and k is odd. This is multiply-shift hashing
(Dietzfelbinger and others, A reliable randomized algorithm for the closest-pair problem, 1997),
with a key for each row.

Whole numbers wrap around alike everywhere, so that no rounding comes in. No generator is asked, and
nothing is read back from a device.
"""

import torch
from torch import Tensor

STEP = 2.0**-23
"""Factor that takes the numbers of `random_rows` to [-1, 1)."""

_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio, as a signed number: steps between the inputs of `_mix`."""
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
"""Multipliers of splitmix64, as signed numbers."""


def row_keys(seed: Tensor, stream: int, matrices: Tensor, rows: int) -> Tensor:
    """Return the keys (k, rows, 2) of k matrices, as int32.

    Args:
        seed: one number from 0 to 2^63, exclusive, int64.
        stream: number of a sequence of matrices. Each stream has matrices of its own.
        matrices: (k,) numbers of the matrices, from 0 to 2^62, exclusive, int64.
        rows: number of rows of a matrix.
    """
    of_stream = _mix(_mix(seed) + stream)
    of_matrix = _mix(of_stream + matrices)
    row = torch.arange(rows, device=seed.device)
    mixed = _mix(of_matrix[:, None] + row)
    # The halves are extended by their sign, so that both fit into int32.
    low, high = (mixed << 32) >> 32, mixed >> 32
    return torch.stack((low, high | 1), -1).to(torch.int32)


def column_hashes(columns: int, device: torch.device) -> Tensor:
    """Return the hash of each column (columns,), as int32."""
    return (_mix(torch.arange(columns, device=device)) >> 32).to(torch.int32)


def random_rows(keys: Tensor, hashes: Tensor) -> Tensor:
    """Return the numbers (..., n) of rows, whole numbers of 24 bits, as int32.

    Args:
        keys: (..., 2), of `row_keys`.
        hashes: (n,), of `column_hashes`.
    """
    mixed = torch.bitwise_xor(hashes, keys[..., :1])
    return mixed.mul_(keys[..., 1:]).bitwise_right_shift_(8)


def _mix(values: Tensor) -> Tensor:
    """Return a hash of 64 bits of each int64: the step and the finalizer of splitmix64."""
    mixed = (values + 1) * _INCREMENT
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        mixed = (mixed ^ _shift_right(mixed, shift)) * factor
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift to the right, with zeros from the left. Shifting an int64 repeats its sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
