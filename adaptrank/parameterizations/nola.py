"""NOLA: low-rank factors that are sums of random matrices, with one trained number for each."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost
from adaptrank.parameterizations.capabilities import Capability
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.low_rank import LowRankUpdate

DRAWS = 1 << 62
"""Seeds, and numbers of fresh matrices, are drawn from 0 to this, exclusive."""


class NOLA(LowRankUpdate):
    """W' = W + s B A with A = A0 + c_A sum_j alpha_j A_j and B = c_B sum_j beta_j B_j.

    s = alpha / rank is fixed at construction. The matrices A0, A_j, B_j are random and frozen, and
    never stored in a file. Matrix j of a side is drawn from (seed, side, j) by a generator of its
    own on the CPU, so that it is the same on every device, whatever other matrices there are. The
    forward pass draws `chunk` of them at a time and the backward pass draws them again:
    chunk * rank * max(m, n) numbers in memory, and a lot of time. With `materialize=True` they stay
    in memory, the same to the bit. The rank costs nothing and cannot move. The matrices of either
    side are the units that move.

    Source: arXiv:2310.02556, and the released code (UCDvision/NOLA at 03c7027). Its scripts take
        256 or 512 matrices a side for GPT-2, 512 for LLaMA-2 and 1024 for ViT, and its class 1024.
        The default here is 32, because drawing takes the time of a step: forward and backward of a
        layer of 768 x 768 with 512 tokens took 20 ms at 32, 92 ms at 512 and 215 ms at 1024, on one
        core of a CPU, where a LoRA took 13 ms.
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
        materialize: keep the matrices in memory.
        chunk: number of matrices that are combined at a time.
    Raises:
        ValueError: if rank, k_a, k_b or chunk is below 1.
    """

    source = "arXiv:2310.02556"
    accepts = layers.MATRICES
    axes = {"alpha": {"ids_a": 0, "alpha": 0}, "beta": {"ids_b": 0, "beta": 0}}
    capabilities = frozenset({Capability.GROW, Capability.ORDERED})
    seed: Tensor
    ids_a: Tensor
    ids_b: Tensor
    A0: Tensor | None
    bases_a: Tensor | None
    bases_b: Tensor | None

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
            self.c = (1 / math.sqrt(rank * n), 1 / math.sqrt(rank * m))
        else:
            self.c = (k_a**-0.5, k_b**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.alpha = self.zeros(k_a)
        self.beta = self.zeros(k_b)
        if init == "paper":
            nn.init.normal_(self.alpha)
        elif init == "released":
            nn.init.constant_(self.alpha, 1 / k_a)
            nn.init.constant_(self.beta, 1 / k_b)
        device = self.alpha.device
        self.register_buffer("seed", torch.randint(DRAWS, (), device="cpu").to(device))
        self.register_buffer("ids_a", torch.arange(k_a, device=device))
        self.register_buffer("ids_b", torch.arange(k_b, device=device))
        for name in ("A0", "bases_a", "bases_b"):
            self.register_buffer(name, None, persistent=False)
        self.refresh()

    def acts_without(self, axis: str) -> bool:
        return not self.stopped_by(axis)

    def stopped_by(self, axis: str) -> Collection[str]:
        has_anchor = axis == "alpha" and self.init == "anchored"
        return () if has_anchor else self.axes

    def refresh(self) -> None:
        if self.seed.is_meta:
            return
        if self.init == "anchored":
            r, n = self.matrix_shape("a")
            A0 = _draw(int(self.seed), "A0", 0, (r, n)) / math.sqrt(n)
            self.A0 = A0.to(self.alpha)
        if self.materialize:
            self.bases_a, self.bases_b = self._kept("a"), self._kept("b")

    @formula
    def weight(self) -> Tensor:
        W = self.base_weight
        A = self.c[0] * self._weighted_sum("a", self.gated("alpha"), like=W)
        A = A if self.A0 is None else self.A0 + A
        B = self.c[1] * self._weighted_sum("b", self.gated("beta"), like=W)
        return W + self.scale * B @ A

    def _weighted_sum(self, side: str, coefficients: Tensor, like: Tensor) -> Tensor:
        """Return the sum of the matrices of a side, one after the other, each drawn anew."""
        total = like.new_zeros(())
        for coefficient, j in zip(coefficients, self._ids(side), strict=True):
            matrix = _draw(int(self.seed), side, j, self.matrix_shape(side)).to(like)
            total = total + coefficient * matrix
        return total

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self._combined("a", self.gated("alpha"), self.c[0])
        A = A if self.A0 is None else self.A0 + A
        return self.scale * self._combined("b", self.gated("beta"), self.c[1]), A

    def cost(self) -> Cost:
        (m, n), r = self.shape, self.rank
        chunks_a, chunks_b = (math.ceil(len(t) / self.chunk) for t in (self.alpha, self.beta))
        once = 2 * r * self.chunk * (chunks_a * n + chunks_b * m)
        return Cost(flops=2 * r * (m + n), flops_once=once, kept=n + r)

    def index_ranges(self) -> dict[str, range]:
        return dict.fromkeys(("seed", "ids_a", "ids_b"), range(DRAWS))

    def numbers_beside_tensors(self) -> int:
        drawn = max(math.prod(self.matrix_shape(side)) for side in ("a", "b"))
        kept = (len(self.alpha) + len(self.beta)) * drawn if self.materialize else 0
        return (self.chunk + 1) * drawn + kept

    def fresh(self, axis: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Drawn from 2^62 numbers. The next unused number may be that of a unit which was just
        # pruned.
        name = "ids_a" if axis == "alpha" else "ids_b"
        return {name: torch.randint(DRAWS, (n,), generator=generator)}

    def matrix_shape(self, side: str) -> tuple[int, int]:
        """Return the shape of a matrix of a side, "a" or "b"."""
        return (self.rank, self.shape[1]) if side == "a" else (self.shape[0], self.rank)

    def _ids(self, side: str) -> list[int]:
        return cast(list[int], cast(Tensor, getattr(self, f"ids_{side}")).tolist())

    def _drawn(self, side: str) -> Iterator[Tensor]:
        """Yield the matrices of a side on the CPU, as (chunk, r n) or (chunk, m r) at a time.

        Zeros fill the last chunk up.
        """
        shape = self.matrix_shape(side)
        return _chunks(int(self.seed), side, self._ids(side), shape, self.chunk)

    def _kept(self, side: str) -> Tensor:
        """Return the matrices of a side as they are kept, (chunks, chunk, size)."""
        chunks = [*self._drawn(side)]
        size = math.prod(self.matrix_shape(side))
        kept = torch.stack(chunks) if chunks else torch.empty(0, self.chunk, size)
        return kept.to(self.alpha)

    def _combined(self, side: str, coefficients: Tensor, c: float) -> Tensor:
        """Return c sum_j a_j A_j, or that of the output side, in the dtype of the coefficients."""
        kept = cast(Tensor | None, getattr(self, f"bases_{side}"))
        shape = self.matrix_shape(side)
        if not len(coefficients):
            return coefficients.new_zeros(shape)
        draw: Callable[[], Any]
        if kept is None:
            # Bound to the current values, because a backward pass may come after a resize.
            ids = self._ids(side)
            draw = partial(_chunks, int(self.seed), side, ids, shape, self.chunk)
        else:
            draw = kept.unbind
        # Chunks have one size, so that neither a fresh unit nor materializing changes the order in
        # which a product is summed.
        padded = F.pad(coefficients, (0, -len(coefficients) % self.chunk)).view(-1, 1, self.chunk)
        wide = padded.to(torch.promote_types(torch.float32, padded.dtype))
        total = cast(Tensor, _Combine.apply(wide, draw))  # type: ignore[no-untyped-call]
        return c * total.to(coefficients.dtype).view(shape)


def _draw(seed: int, side: str, j: int, shape: tuple[int, int]) -> Tensor:
    """Return matrix j of a side, uniform in (-1, 1), float32."""
    return _fill(torch.empty(shape, device="cpu", dtype=torch.float32), seed, side, j)


def _fill(out: Tensor, seed: int, side: str, j: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{side}/{j}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return out.uniform_(-1, 1, generator=generator)


def _chunks(
    seed: int, side: str, ids: Sequence[int], shape: tuple[int, int], chunk: int
) -> Iterator[Tensor]:
    """Yield matrices as rows, (chunk, size) at a time, the last chunk filled up with zeros."""
    for start in range(0, len(ids), chunk):
        drawn_ids = ids[start : start + chunk]
        rows = torch.empty(chunk, math.prod(shape), device="cpu", dtype=torch.float32)
        rows[len(drawn_ids) :] = 0
        for row, j in zip(rows, drawn_ids, strict=False):
            _fill(row, seed, side, j)
        yield rows


class _Combine(torch.autograd.Function):
    """sum_j c_j M_j -> (1, size), from coefficients (chunks, 1, chunk).

    The backward pass draws the matrices again.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, draw: Callable[[], Iterator[Tensor]]) -> Tensor:
        ctx.draw = draw
        products = (row @ rows.to(row) for row, rows in zip(coefficients, draw(), strict=True))
        total: Tensor = next(products)
        for product in products:
            total = total + product
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads  # (1, size)
        return torch.stack([g @ rows.to(g).T for rows in ctx.draw()]), None
