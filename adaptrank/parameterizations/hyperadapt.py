"""HyperAdapt: a trained scale for every row and every column of a frozen weight."""

from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.ops import low_rank as ops
from adaptrank.ops import scaling
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate


class HyperAdapt(Parameterization):
    """W' = diag(1 + da) W diag(1 + dc): one scale a row, one a column, m + n parameters.

    The change W' - W can have any rank up to min(2 rank(W), m, n). It starts at W exactly. That the
    paper starts at ones too is recalled, not verified. The parameters are the deviations from 1, so
    that neither half-precision activations nor weight decay distort them. There is no rank axis:
    the cost is fixed.

    Source: arXiv:2509.18629 (formula, parameter count and rank bound from the abstract).
    Shapes: W (m, n), da (m,), dc (n,). Extra cost: N (m + n) multiplications for N tokens, and no
        second product. Training keeps x and y only, no scaled copies. A column of an embedding is a
        token. A column of a convolution is an input channel: its dc has one entry for each channel,
        not for each tap.
    Args:
        rows: train the row scales da.
        cols: train the column scales dc.
    Raises:
        ValueError: if neither rows nor columns are trained.
    """

    source = "arXiv:2509.18629"
    accepts = layers.MATRICES
    reads_weight = True
    no_decay = ("da", "dc")
    kinds = {"da": TensorKind.SCALES, "dc": TensorKind.SCALES}
    studied_rate = StudiedRate(1e-2, "docs/results/study_budgets.md")

    def __init__(self, base: nn.Module, *, rows: bool = True, cols: bool = True) -> None:
        super().__init__(base)
        if not (rows or cols):
            raise UserError(
                "HyperAdapt(rows=False, cols=False) trains nothing; leave one of them on."
            )
        m, n = self.shape
        plain = self.innermost
        # Columns that share a scale.
        self.taps = n // plain.in_channels if isinstance(plain, nn.Conv2d) else 1
        self.da = self.zeros(m) if rows else None
        self.dc = self.zeros(n // self.taps) if cols else None

    @formula
    def weight(self) -> Tensor:
        weight = self.base_weight
        if self.da is not None:
            weight = (1 + self.da)[:, None] * weight
        if self.dc is not None:
            weight = weight * (1 + self.dc).repeat_interleave(self.taps)
        return weight

    def forward_adapted(self, x: Tensor) -> Tensor:
        if self.da is not None and self.dc is not None and self.fuses(x):
            frozen = ops.plain(self.base, x.dtype)
            if frozen is not None:
                return scaling.linear(x, *frozen, self.da, self.dc)
        plain = self.innermost
        if isinstance(plain, nn.Embedding):
            y: Tensor = self.base(x)
            # W (dc * onehot(x)) is a column of W, scaled by the token's own number.
            if self.dc is not None:
                y = y + y * self.dc[x][..., None].to(y.dtype)
        else:
            if self.dc is not None:
                scaled = scaling.scale_input(layers.channels_last(plain, x), self.dc)
                x = layers.channels_first(plain, scaled)
            y = self.base(x)
        # The bias is subtracted inside the deviation, so that da = 0 is the identity to the bit.
        if self.da is not None:
            channels = layers.channels_last(plain, y)
            scaled = scaling.scale_output(channels, self.da, self.trained_bias())
            y = layers.channels_first(plain, scaled)
        return y

    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(kept=(n if self.dc is not None else 0) + (m if self.da is not None else 0))
