"""ResidualOffset: a trained vector added to the output of a projection."""

from torch import Tensor, nn

from adaptrank import layers
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate


class ResidualOffset(Parameterization):
    """y' = W x + b + d: a trained offset d on the output of a projection.

    The weight stays as it is. Around the last projection of the attention and of the MLP this is
    the domain residual adapter (DRA) of eTT, x <- x + MHSA(x) + d1 and x <- x + MLP(x) + d2: a
    bias, and no low-rank matrix. It starts at the layer exactly. There is no rank axis: the cost is
    fixed. Merging adds d to the bias, and gives the layer one if it has none. If a layer scale or a
    norm stands between the projection and the residual sum, d comes before it.

    Source: AttnScale and DRA, arXiv:2304.01917 (abstract). That DRA is an offset is from the code
        of eTT. Learning rates were not read.
    Shapes: W (m, n), d (m,). Parameters: m.
    """

    source = "arXiv:2304.01917"
    accepts = layers.LINEAR
    studied_rate = StudiedRate(1e-2, "docs/results/study_methods_at_defaults.md")
    no_decay = ("d",)
    kinds = {"d": TensorKind.OFFSETS}

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.d = self.zeros(self.shape[0])

    @formula
    def weight(self) -> Tensor:
        return self.base_weight

    def trained_bias(self) -> Tensor | None:
        bias = super().trained_bias()
        if not self.enabled:
            return bias
        return self.d if bias is None else bias.to(self.d.dtype) + self.d

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        return self.d

    def add_change(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + d. The input is not read, and so it is not cast."""
        return y + self.d.to(y.dtype)

    def cost(self) -> Cost:
        return Cost()
