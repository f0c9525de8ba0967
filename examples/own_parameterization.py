"""Write a parameterization: HiRA, an update of high rank from two small factors.

HiRA multiplies the frozen weight by a low-rank matrix, element by element. The method has one rank
axis, so that every allocator can prune it and grow it.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from adaptrank import Parameterization, adapt, merge, rank_axes
from adaptrank.parameterizations import formula
from adaptrank.testing import check_parameterization


class HiRA(Parameterization):
    """W' = W + s W * (B A), with * the product of elements and s = alpha / rank.

    Source: HiRA, ICLR 2025. The formula is recalled, and was not compared with the paper.
    Shapes: W (m, n), A (r, n), B (m, r). Parameters: r (m + n).
    Args:
        rank: number r of units. A unit is a column of B and a row of A.
        alpha: numerator of the scale s, which stays what it is when the rank changes.
    """

    source = "HiRA, ICLR 2025"
    # Units are counted by dimension 0 of A and by dimension 1 of B. B comes last because it starts
    # at zero: a new unit changes nothing.
    axes = {"rank": {"A": 0, "B": 1}}
    reads_weight = True

    def __init__(self, base: nn.Module, *, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__(base)
        m, n = self.shape
        self.scale = alpha / rank
        self.A = self.zeros(rank, n)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = self.zeros(m, rank)

    @formula
    def weight(self) -> Tensor:
        return self.base_weight + self.change

    @property
    def change(self) -> Tensor:
        """Update that is added to the weight, (m, n)."""
        # An allocator may multiply the units of B by a gate.
        return self.scale * self.base_weight * (self.gated("B") @ self.A)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.linear(x, self.change.to(x.dtype))


def main() -> None:
    # The contract: gradients, growth, pruning, files, merging, half precision, and more.
    check_parameterization(HiRA, count=lambda m, n: 8 * (m + n))
    print("HiRA keeps the contract of a parameterization")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    adapt(model, "all-linear", partial(HiRA, rank=3))
    x = torch.randn(8, 16)
    expected = model(x)
    axis = rank_axes(model)["0:rank"]
    axis.resize(grow=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), expected)
    print(f"{axis.key} has {len(axis)} units, and the outputs are the same")
    merge(model)
    print(f"merged: the first layer is a {type(model[0]).__name__}")


if __name__ == "__main__":
    main()
