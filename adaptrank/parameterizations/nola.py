"""NOLA: low-rank factors that are sums of random matrices, with one trained number for each."""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.ops import random_rows
from adaptrank.parameterizations.base import Cost
from adaptrank.parameterizations.capabilities import Capability
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate
from adaptrank.parameterizations.nola_generators import GeneratedChunks, draw_matrix
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate

DRAWS = 1 << 62
"""Numbers of fresh matrices are drawn from 0 to this, exclusive."""
SEEDS = range(DRAWS, 2 * DRAWS - 1)
"""Seeds of hashed matrices. A lower seed is that of an earlier version, which drew others."""
STREAMS = {"A0": 0, "a": 1, "b": 2}
"""Numbers of the sequences of random matrices of a layer."""


class NOLA(LowRankUpdate):
    """W' = W + s B A with A = A0 + c_A sum_j alpha_j A_j and B = c_B sum_j beta_j B_j.

    s = alpha / rank is fixed at construction. The matrices A0, A_j, B_j are random and frozen, and
    never stored in a file. Each of their numbers is a hash of the seed, the side, j and its
    position (`ops.random_rows`): the same bits on every device, whatever other matrices there are.
    The forward pass computes `chunk` matrices at a time and the backward pass computes them again,
    in memory for 2 chunk * rank * max(m, n) numbers. With `materialize=True` they stay in memory,
    the same to the bit. The rank costs nothing and cannot move. The matrices of either side are the
    units that move.

    Earlier versions drew the matrices with a generator for each on the CPU. Their files and
    checkpoints keep them, because the seed says which they are, and keep their cost.

    Source: arXiv:2310.02556, and the released code (UCDvision/NOLA at 03c7027). Its scripts take
        256 or 512 matrices a side for GPT-2, 512 for LLaMA-2 and 1024 for ViT, and its class 1024.
        The default here is 32. Forward and backward of a layer of 768 x 768 with 512 tokens took
        1.1 times the time of a LoRA at 32 matrices a side, 1.8 times at 512 and 2.5 times at 1024,
        on one core of a CPU. Generators took 1.4, 6.7 and 12 times.
    Shapes: W (m, n), A_j (r, n), B_j (m, r), alpha (k_a,), beta (k_b,). Parameters: k_a + k_b.
    Args:
        rank: number r of rows of A.
        alpha: numerator of the scale s, not the coefficients.
        k_a: number of matrices on the input side; k_a=512, k_b=512 is the release's for language
            models.
        k_b: number of matrices on the output side.
        dropout: probability of dropping an input element on the way to A, in [0, 1).
        init: "anchored" as the code for language models has it: A0 uniform as in LoRA,
            alpha = beta = 0, c = 1/sqrt(k), A_j and B_j uniform in (-1, 1). "paper" has A0 = 0 and
            alpha from N(0, 1), because two zeros would never move. "released" as the code for ViT:
            A0 = 0, alpha = beta = 1/k, c_A = 1/sqrt(r n) and c_B = 1/sqrt(r m), which does not
            start at W. A k in c is that of the construction.
        materialize: keep the matrices in memory, rank * (k_a n + k_b m) numbers. The layer above
            took 1.0, 1.25 and 1.45 times the time of a LoRA with them, and 0.7, 11 and 21 times the
            memory of its weight. So it pays for 512 matrices and more over a small model that is
            not compiled. A compiler computes the matrices within the sum.
        chunk: number of matrices that are combined at a time. A larger chunk takes fewer kernels
            and more memory.
    Raises:
        ValueError: if rank, k_a, k_b or chunk is below 1.
    """

    source = "arXiv:2310.02556"
    accepts = layers.MATRICES
    axes = {"alpha": {"ids_a": 0, "alpha": 0}, "beta": {"ids_b": 0, "beta": 0}}
    studied_rate = StudiedRate(1e-2, "docs/results/study_methods_at_defaults.md")
    kinds = {"alpha": TensorKind.COEFFICIENTS, "beta": TensorKind.COEFFICIENTS}
    capabilities = frozenset({Capability.GROW, Capability.ORDERED})
    seed: Tensor
    ids_a: Tensor
    ids_b: Tensor
    A0: Tensor | None
    keys_a: Tensor | None
    keys_b: Tensor | None
    hashes: Tensor | None
    bases_a: Tensor | None
    bases_b: Tensor | None
    hashed: bool = False
    """Whether the matrices are hashes of the seed. In earlier versions generators drew them."""

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 8.0,
        k_a: int = 32,
        k_b: int = 32,
        dropout: float = 0.0,
        init: Literal["anchored", "paper", "released"] = "anchored",
        materialize: bool = False,
        chunk: int = 32,
    ) -> None:
        super().__init__(base)
        m, n = self.shape
        if min(rank, k_a, k_b, chunk) < 1:
            raise UserError(
                f"rank={rank}, k_a={k_a}, k_b={k_b}, chunk={chunk}: use 1 or more of each."
            )
        self.scale = alpha / rank
        self.rank, self.init, self.materialize, self.chunk = rank, init, materialize, chunk
        self.starts_at_base = init != "released"
        if init == "released":
            self.c_a, self.c_b = 1 / math.sqrt(rank * n), 1 / math.sqrt(rank * m)
        else:
            self.c_a, self.c_b = k_a**-0.5, k_b**-0.5
        self.dropout = nn.Dropout(dropout)
        self.alpha = self.zeros(k_a)
        self.beta = self.zeros(k_b)
        if init == "paper":
            nn.init.normal_(self.alpha)
        elif init == "released":
            nn.init.constant_(self.alpha, 1 / k_a)
            nn.init.constant_(self.beta, 1 / k_b)
        device = self.alpha.device
        seed = torch.randint(SEEDS.start, SEEDS.stop, (), device="cpu")
        self.register_buffer("seed", seed.to(device))
        self.register_buffer("ids_a", torch.arange(k_a, device=device))
        self.register_buffer("ids_b", torch.arange(k_b, device=device))
        for name in ("A0", "keys_a", "keys_b", "hashes", "bases_a", "bases_b"):
            self.register_buffer(name, None, persistent=False)
        self.hashed = True
        self._derive()

    def acts_without(self, axis: str) -> bool:
        return not self.stopped_by(axis)

    def stopped_by(self, axis: str) -> Collection[str]:
        has_anchor = axis == "alpha" and self.init == "anchored"
        return () if has_anchor else self.axes

    def refresh(self) -> None:
        # The seed may be another one after a load.
        if not self.seed.is_meta:
            self.hashed = int(self.seed) in SEEDS
        self._derive()

    def _derive(self) -> None:
        """Compute what follows from the seed and the numbers of the matrices."""
        if self.seed.is_meta:
            return
        self.keys_a = self.keys_b = self.hashes = None
        if self.hashed:
            self.keys_a, self.keys_b = self._chunked_keys("a"), self._chunked_keys("b")
            self.hashes = random_rows.column_hashes(max(self.shape), self.seed.device)
        if self.init == "anchored":
            (A0,) = self._matrices("A0", self.ids_a.new_zeros(1))
            self.A0 = (A0 / math.sqrt(self.shape[1])).to(self.alpha)
        if self.materialize:
            self.bases_a, self.bases_b = self._kept("a"), self._kept("b")

    @formula
    def weight(self) -> Tensor:
        W = self.base_weight
        A = self.c_a * self._weighted_sum("a", self.gated("alpha"), like=W)
        A = A if self.A0 is None else self.A0 + A
        B = self.c_b * self._weighted_sum("b", self.gated("beta"), like=W)
        return W + self.scale * B @ A

    def _weighted_sum(self, side: str, coefficients: Tensor, like: Tensor) -> Tensor:
        """Return the sum of the matrices of a side, one after the other."""
        total = like.new_zeros(())
        for coefficient, matrix in zip(coefficients, self.matrices(side), strict=True):
            total = total + coefficient * matrix.to(like)
        return total

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self._combined("a", self.gated("alpha"), self.c_a, self.A0)
        return self._combined("b", self.gated("beta"), self.scale * self.c_b), A

    def cost(self) -> Cost:
        (m, n), r = self.shape, self.rank
        chunks_a, chunks_b = (math.ceil(len(t) / self.chunk) for t in (self.alpha, self.beta))
        once = 2 * r * self.chunk * (chunks_a * n + chunks_b * m)
        return Cost(flops=2 * r * (m + n), flops_once=once, kept=n + r)

    def index_ranges(self) -> dict[str, range]:
        return {"seed": range(SEEDS.stop), "ids_a": range(DRAWS), "ids_b": range(DRAWS)}

    def numbers_beside_tensors(self) -> int:
        matrices = len(self.alpha) + len(self.beta)
        drawn = self.rank * max(self.shape)
        kept = matrices * drawn if self.materialize else 0
        keys = 2 * self.rank * matrices + max(self.shape)
        return (self.chunk + 1) * drawn + kept + keys

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Drawn from 2^62 numbers. The next unused number may be that of a unit which was just
        # pruned.
        name = "ids_a" if axis == "alpha" else "ids_b"
        return {name: torch.randint(DRAWS, (n,), generator=generator)}

    def matrix_shape(self, side: str) -> tuple[int, int]:
        """Return the shape of a matrix of a side, "a" or "b"."""
        return (self.shape[0], self.rank) if side == "b" else (self.rank, self.shape[1])

    def matrices(self, side: str) -> Iterator[Tensor]:
        """Yield the random matrices of a side, "a" or "b", one at a time, in float32."""
        return self._matrices(side, self._ids(side))

    def _matrices(self, side: str, ids: Tensor) -> Iterator[Tensor]:
        if not self.hashed:
            for j in ids.tolist():
                yield draw_matrix(int(self.seed), side, j, self.matrix_shape(side))
            return
        hashes = random_rows.column_hashes(self._width(side), self.seed.device)
        for keys in random_rows.row_keys(self.seed, STREAMS[side], ids, self.rank):
            rows = random_rows.STEP * random_rows.random_rows(keys, hashes).to(torch.float32)
            yield rows.T if side == "b" else rows

    def _width(self, side: str) -> int:
        """Return the length of a hashed row. Matrices of the output side are hashed transposed."""
        m, n = self.shape
        return m if side == "b" else n

    def _ids(self, side: str) -> Tensor:
        return self.ids_a if side == "a" else self.ids_b

    def _chunked_keys(self, side: str) -> Tensor:
        """Return the keys of a side's rows, (chunks, chunk, r, 2), the last chunk filled up."""
        ids = self._ids(side)
        ids = F.pad(ids, (0, -len(ids) % self.chunk))
        keys = random_rows.row_keys(self.seed, STREAMS[side], ids, self.rank)
        return keys.view(-1, self.chunk, self.rank, 2)

    def _drawn(self, side: str) -> "HashedChunks | GeneratedChunks":
        """Return the chunks of a side, which are computed when they are read.

        They are bound to the current values, because a backward pass may come after a resize.
        """
        if not self.hashed:
            ids, shape = self._ids(side).tolist(), self.matrix_shape(side)
            return GeneratedChunks(int(self.seed), side, ids, shape, self.chunk)
        keys = self.keys_a if side == "a" else self.keys_b
        assert keys is not None
        assert self.hashes is not None
        return HashedChunks(keys, self.hashes[: self._width(side)])

    def _kept(self, side: str) -> Tensor:
        """Return the chunks of a side as they are kept, (chunks, chunk, size)."""
        drawn = self._drawn(side)
        rows = [drawn[i] for i in range(len(drawn))]
        kept = torch.stack(rows) if rows else torch.empty(0, self.chunk, 1)
        if self.hashed:
            # Whole numbers stay as they are where a model is cast to half precision.
            return kept.to(self.alpha.device)
        return kept.to(device=self.alpha.device, dtype=_exact(self.alpha.dtype))

    def _combined(
        self, side: str, coefficients: Tensor, c: float, start: Tensor | None = None
    ) -> Tensor:
        """Return start + c sum_j a_j A_j, or that of the output side, in their dtype."""
        shape = self.matrix_shape(side)
        if not len(coefficients):
            return coefficients.new_zeros(shape) if start is None else start
        kept = self.bases_a if side == "a" else self.bases_b
        chunks = self._drawn(side) if kept is None else kept
        # Chunks have one size, so that neither a fresh unit nor materializing changes the order in
        # which a product is summed.
        step = random_rows.STEP if self.hashed else 1.0
        wide = (c * step) * coefficients.to(_exact(coefficients.dtype))
        missing = len(chunks) * self.chunk - len(coefficients)
        # A compiler that leaves the number of units open must not ask for it.
        pads = torch.compiler.is_compiling() or missing
        padded = F.pad(wide, (0, missing)) if pads else wide
        flat_start = None if start is None else start.to(wide.dtype).reshape(1, -1)
        by_chunk = padded.view(-1, 1, self.chunk)
        combined = _Combine.apply(by_chunk, flat_start, chunks)  # type: ignore[no-untyped-call]
        total = cast(Tensor, combined).to(coefficients.dtype)
        # The product with a transposed factor takes no copy of it.
        return total.view(shape[::-1]).T if self.hashed and side == "b" else total.view(shape)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which matrices are summed: float32 or better."""
    return torch.promote_types(torch.float32, dtype)


class HashedChunks:
    """Chunks of hashed matrices, which are computed when they are read.

    Args:
        keys: (chunks, chunk, r, 2), of `row_keys`.
        hashes: (n,), of `column_hashes`.
    """

    def __init__(self, keys: Tensor, hashes: Tensor) -> None:
        self.keys, self.hashes = keys, hashes

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Tensor:
        """Return the matrices of a chunk as rows, (chunk, r n), in whole numbers."""
        return random_rows.random_rows(self.keys[index], self.hashes).flatten(1)


_Chunks = HashedChunks | GeneratedChunks | Tensor
"""Chunks (chunk, size) of the matrices of a side, by their index."""


class _Combine(torch.autograd.Function):
    """start + sum_j c_j M_j -> (1, size), from coefficients (chunks, 1, chunk).

    The backward pass draws the matrices again.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, start: Tensor | None, chunks: _Chunks) -> Tensor:
        ctx.chunks = chunks
        total = start
        with _without_autocast(coefficients.device):
            for i, row in enumerate(coefficients):
                total = _add_product(total, row, chunks[i].to(row))
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads  # (1, size)
        with _without_autocast(g.device):
            products = [_products(g, ctx.chunks[i].to(g)) for i in range(len(ctx.chunks))]
        of_chunks = torch.stack(products) if len(products) > 1 else products[0][None]
        return of_chunks, None, None


def _add_product(total: Tensor | None, row: Tensor, rows: Tensor) -> Tensor:
    """Return total + row rows, (1, size), for row (1, chunk) and rows (chunk, size)."""
    if torch.compiler.is_compiling():
        # The compiler computes the rows within a sum. A matrix product would read them from memory.
        product = (row.T * rows).sum(0, keepdim=True)
        return product if total is None else total + product
    return row @ rows if total is None else torch.addmm(total, row, rows)


def _products(g: Tensor, rows: Tensor) -> Tensor:
    """Return g rows^T, (1, chunk), for g (1, size) and rows (chunk, size)."""
    if torch.compiler.is_compiling():
        return (g * rows).sum(1)[None]
    return g @ rows.T


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products are taken in float32.

    Hashed matrices hold whole numbers up to 2^23, which float16 does not.
    """
    # The meta device has no autocast.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
