"""LNTune: the gain and the shift of a norm, trained."""

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.module import ModuleWrapper


class LNTune(ModuleWrapper):
    """y = (g + dg) z + (b + db) with z the normalized input: a norm's gain and shift, trained.

    dg and db are deviations from the frozen gain and shift. The output is computed as
    norm(x) + (dg z + db), where the change is the same norm with other gains. So it starts at the
    norm to the last bit, and half precision, whose steps near 1 are 2^-7, does not lose small
    deviations. A norm without a shift (RMSNorm) has dg alone. A norm that multiplies by 1 + w
    (Gemma) is recognized by its output for a zero weight. There is no rank axis: the cost is fixed.
    The authors' learning rates were not read. Other reports have it fail at 1e-4, so use 1e-3 to
    1e-2.

    Source: LN-Tune, arXiv:2304.01917 (abstract). That deviations are added, not multiplied, is this
        library's choice.
    Shapes: g, b, dg, db (d,). Parameters: 2 d, or d if the norm has no shift.
    Args:
        gain: train the gain.
        shift: train the shift, of norms that have one.
    Raises:
        ValueError: if neither the gain nor a shift is trained.
    """

    source = "arXiv:2304.01917"
    accepts = (nn.LayerNorm, nn.RMSNorm)
    no_decay = ("dg", "db")

    def __init__(self, base: nn.Module, *, gain: bool = True, shift: bool = True) -> None:
        super().__init__(base)
        plain = self.innermost
        (width,) = plain.get_parameter("weight").shape
        shift = shift and getattr(plain, "bias", None) is not None
        if not (gain or shift):
            raise UserError(
                f"LNTune trains nothing of this {type(plain).__name__}, which has a gain only; "
                f"say gain=True."
            )
        self.dg = self.zeros(width) if gain else None
        self.db = self.zeros(width) if shift else None
        self.plus_one = _multiplies_by_one_plus_weight(plain, width)

    @classmethod
    def wraps(cls, layer: nn.Module) -> bool:
        """Return whether the layer is a norm with one gain for each channel.

        Norms of torch are known by their type, and norms of other libraries by their class name.
        """
        weight = getattr(layer, "weight", None)
        is_norm = isinstance(layer, cls.accepts) or type(layer).__name__.endswith(
            ("LayerNorm", "RMSNorm")
        )
        return is_norm and isinstance(weight, nn.Parameter) and weight.dim() == 1

    @classmethod
    def wraps_what(cls) -> str:
        return "LayerNorm or RMSNorm with one gain a channel"

    @classmethod
    def example(cls) -> nn.Module:
        return nn.LayerNorm(48)

    @formula
    def weight(self) -> Tensor:
        return self.base_weight if self.dg is None else self.base_weight + self.dg

    def trained_bias(self) -> Tensor | None:
        bias = super().trained_bias()
        if bias is None or self.db is None or not self.enabled:
            return bias
        return bias.to(self.db.dtype) + self.db

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dg is None:
            assert self.db is not None
            return self.db
        # Run the norm with a gain of dg and a shift of db in place of its frozen tensors.
        values = {"weight": self.dg - 1 if self.plus_one else self.dg}
        if getattr(self.innermost, "bias", None) is not None:
            values["bias"] = torch.zeros_like(self.dg) if self.db is None else self.db
        change: Tensor = torch.func.functional_call(self.innermost, values, (x,))
        return change

    def cost(self) -> Cost:
        # The input is kept anyway. The kernels of torch keep two numbers more, a mean and a
        # standard deviation.
        return Cost(kept=0 if self.dg is None else 2)


def _multiplies_by_one_plus_weight(norm: nn.Module, width: int) -> bool:
    """Return whether a norm multiplies by 1 + w, judged by its output for zero parameters.

    It is computed on the CPU, because the norm may be on the meta device.
    """
    zeros = {name: torch.zeros(p.shape) for name, p in norm.named_parameters()}
    row = torch.arange(float(width))[None]
    output: Tensor = torch.func.functional_call(norm, zeros, (row,))
    return bool(output.any())
