"""Kronecker: a sum of Kronecker products beside a frozen weight."""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.ops import low_rank as products
from adaptrank.parameterizations.base import Cost, Parameterization


class Kronecker(Parameterization):
    """W' = W + s sum_k A_k kron B_k: a sum of r Kronecker products; A is the coarse factor, whose entries scale blocks of B's size.

    One product can already have full rank: rank(A kron B) = rank(A) rank(B). Of few tokens or products, what is computed is
    A (B X) or (A X) B on the input as a matrix X, whichever is cheaper. From three products and max(m, n) / r tokens on, the change
    of a linear layer is built once a call, in one product of 2 r m n operations, and multiplies all tokens: there it was
    measured to be faster, 1.6 to 2.4 times at 768 x 768 with r = 4 to 8. B starts at zero, so training starts at W. A side
    whose size is prime has no factors: its A is then 1 wide, and B as wide as the layer; a warning says so where a product then
    has more numbers than a LoRA of rank one.

    Source: KronA, arXiv:2212.10650, which is the case r = 1 with a tuned s; only its abstract was read. The balanced factors are the rule of
        HF PEFT's and LyCORIS' LoKr.
    Shapes: W (m, n), A (r, m1, n1), B (r, m2, n2), with m = m1 m2 and n = n1 n2; of a convolution n1 divides the channels.
        Parameters: r (m1 n1 + m2 n2).
    Args:
        rank: number r of products.
        factor: m1 and n1 are the largest divisors up to it; -1 makes m1 <= m2 and n1 <= n2 as equal as possible.
        scale: s.
        dropout: probability of dropping an input element on the way to the products, in [0, 1).
    Raises:
        ValueError: if rank < 1, or factor is neither -1 nor positive.
    """

    source = "arXiv:2212.10650"
    accepts = layers.MATRICES
    axes = {"rank": {"A": 0, "B": 0}}
    reads_blocks = True

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int = 4,
        factor: int = -1,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        if rank < 1:
            raise UserError(f"rank={rank}: a Kronecker has at least one product; use rank >= 1.")
        (m, n), plain = self.shape, self.innermost
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        inputs = plain.in_channels if isinstance(plain, nn.Conv2d) else n
        m1, n1 = divisor(m, factor), divisor(inputs, factor)
        m2, n2 = m // m1, n // n1
        whole = (m1 == 1 and m > 3) or (
            n1 == 1 and inputs > 3
        )  # two classes, or three colours, have nothing to divide
        if factor != 1 and whole and m1 * n1 + m2 * n2 > m + n:
            warnings.warn(
                f"Kronecker on a {m}x{n} layer: with factor={factor} A is {m1}x{n1} and B {m2}x{n2}, {m1 * n1 + m2 * n2:,} "
                f"numbers a product where a LoRA has {m + n:,} a rank; leave the layer out, or use LoRA there.",
                stacklevel=2,
            )
        self.A, self.B = self.zeros(rank, m1, n1), self.zeros(rank, m2, n2)
        nn.init.uniform_(self.A, -1 / math.sqrt(n1), 1 / math.sqrt(n1))

    @property
    def weight(self) -> Tensor:
        terms = (
            torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(self.A, self.B, strict=True)
        )
        return self.base_weight + self.scale * sum(terms, self.B.new_zeros(()))

    def adapted(self, x: Tensor) -> Tensor:
        r = len(self.A)
        if (
            not isinstance(self.innermost, layers.LINEAR)
            or r < 3
            or r * (x.numel() // x.shape[-1]) < max(self.shape)
        ):
            y: Tensor = super().adapted(x)
            return y
        change = torch.einsum("kpu,kqv->pquv", self.A, self.scale * self.B).reshape(self.shape)
        plain = products.plain(self.base)
        if (
            plain is not None
            and products.fits(x)
            and x.dtype == change.dtype
            and not self.dropout.p
        ):
            return F.linear(x, plain[0] + change, plain[1])
        # In half precision W + change would round a small change alike for all tokens: it has a product of its own.
        return self.base(x) + F.linear(self.dropout(x), change.to(x.dtype))  # type: ignore[no-any-return]

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        plain, (n1, n2) = self.innermost, (self.A.shape[2], self.B.shape[2])
        if isinstance(plain, nn.Embedding):  # the column of a product is the product of columns
            a, b = self.A.permute(2, 0, 1)[x // n2], self.B.permute(2, 0, 1)[x % n2]
            return self.scale * torch.einsum("...kp,...kq->...pq", a, b).flatten(-2)
        x = self.dropout(x)
        if isinstance(plain, nn.Conv2d):  # B convolves each group of channels, A mixes the groups
            kernels = self.B.reshape(-1, plain.in_channels // n1, *plain.kernel_size)
            groups = x.reshape(-1, kernels.shape[1], *x.shape[-2:])
            z = plain._conv_forward(groups, kernels, None)
            z = z.reshape(*x.shape[:-3], n1, *self.B.shape[:2], *z.shape[-2:])
            return self.scale * torch.einsum("...ukqhw,kpu->...hwpq", z, self.A).flatten(-2)
        X = x.reshape(*x.shape[:-1], n1, n2)
        if self._coarse_first():
            z = torch.einsum("...uv,kpu->...kpv", X, self.A)
            return self.scale * torch.einsum("...kpv,kqv->...pq", z, self.B).flatten(-2)
        z = torch.einsum("...uv,kqv->...ukq", X, self.B)
        return self.scale * torch.einsum("...ukq,kpu->...pq", z, self.A).flatten(-2)

    def _coarse_first(self) -> bool:
        (_, m1, n1), (_, m2, n2) = self.A.shape, self.B.shape
        return n2 * m1 * (n1 + m2) < n1 * m2 * (n2 + m1)

    def cost(self) -> Cost:  # of few tokens; of many it is 2 m n a token, and 2 r m n once
        (r, m1, n1), (_, m2, n2) = self.A.shape, self.B.shape
        if self._coarse_first():
            return Cost(flops=2 * r * n2 * m1 * (n1 + m2), kept=n1 * n2 + r * m1 * n2)
        return Cost(flops=2 * r * n1 * m2 * (n2 + m1), kept=n1 * n2 + r * n1 * m2)


def divisor(size: int, factor: int) -> int:
    """The largest divisor of `size` up to `factor`; for -1 up to its root, so that it and its partner are most equal.

    Raises:
        ValueError: if factor is neither -1 nor positive.
    """
    if factor < 1 and factor != -1:
        raise UserError(
            f"factor={factor}: use -1 for factors as equal as possible, or a positive number."
        )
    return next(
        d
        for d in range(math.isqrt(size) if factor == -1 else min(factor, size), 0, -1)
        if size % d == 0
    )
