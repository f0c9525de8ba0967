"""Random matrices as NOLA drew them in version 0.1: with a generator on the CPU for each.

Files of that version hold nothing else of the matrices than the seed and their numbers.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def draw_matrix(seed: int, side: str, j: int, shape: tuple[int, int]) -> Tensor:
    """Return matrix j of a side, uniform in [-1, 1), float32, on the CPU."""
    return _fill(torch.empty(shape, device="cpu", dtype=torch.float32), seed, side, j)


class GeneratedChunks:
    """Chunks of matrices, which are drawn when they are read.

    Args:
        seed: seed of the layer.
        side: "a" or "b".
        ids: numbers of the matrices.
        shape: of a matrix.
        chunk: number of matrices in a chunk.
    """

    def __init__(
        self, seed: int, side: str, ids: Sequence[int], shape: tuple[int, int], chunk: int
    ) -> None:
        self.seed, self.side, self.ids = seed, side, ids
        self.shape, self.chunk = shape, chunk

    def __len__(self) -> int:
        return math.ceil(len(self.ids) / self.chunk)

    def __getitem__(self, index: int) -> Tensor:
        """Return the matrices of a chunk as rows (chunk, size), filled up with zeros."""
        ids = self.ids[index * self.chunk :][: self.chunk]
        rows = torch.empty(self.chunk, math.prod(self.shape), device="cpu", dtype=torch.float32)
        rows[len(ids) :] = 0
        for row, j in zip(rows, ids, strict=False):
            _fill(row, self.seed, self.side, j)
        return rows


def _fill(out: Tensor, seed: int, side: str, j: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{side}/{j}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return out.uniform_(-1, 1, generator=generator)
