"""LNTune: the gain and the shift of a norm, trained."""

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.module import ModuleWrapper
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate


class LNTune(ModuleWrapper):
    """y = (g + dg) z + (b + db) with z the normalized input: a norm's gain and shift, trained.

    dg and db are deviations from the frozen gain and shift, in float32 or better. The norm runs
    once, with their sums. So it starts at the norm to the last bit. In half precision, whose steps
    near 1 are 2^-7, a rounded sum would lose small deviations. There the norm runs with sums in
    float32 if it then starts at the same bits, as Llama's does. Otherwise the output is
    norm(x) + (dg z + db), where the change is the same norm with other gains.

    A norm without a shift (RMSNorm) has dg alone. A norm that multiplies by 1 + w (Gemma) is
    recognized by its output for a zero weight. There is no rank axis: the cost is fixed. The
    authors' learning rates were not read. Other reports have it fail at 1e-4, so use 1e-3 to 1e-2.

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
    studied_rate = StudiedRate(5e-3, "docs/results/study_hyperadapt_trec.md")
    accepts = (nn.LayerNorm, nn.RMSNorm)
    no_decay = ("dg", "db")
    kinds = {"dg": TensorKind.SCALES, "db": TensorKind.OFFSETS}

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
        self.takes_wide_gain = _takes_wide_gain(plain, width)

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

    def forward_adapted(self, x: Tensor) -> Tensor:
        if not self._runs_once():
            return super().forward_adapted(x)  # type: ignore[no-any-return]
        gain = self.innermost.get_parameter("weight")
        values = {}
        if self.dg is not None:
            values["weight"] = gain + self.dg
        if self.db is not None:
            values["bias"] = self.innermost.get_parameter("bias") + self.db
        y: Tensor = torch.func.functional_call(self.base, values, (x,))
        return y.to(x.dtype) if self.takes_wide_gain else y

    def _runs_once(self) -> bool:
        """Return whether one run of the norm, with the sums, keeps the bits of its start."""
        # A wrapper inside changes the gain that this one adds to. A replaced forward may fetch the
        # gain at the call, and a hook may read what the frozen norm computes.
        if isinstance(self.base, Parameterization) or _is_observed(self.base):
            return False
        trained = self.db if self.dg is None else self.dg
        assert trained is not None
        gain = self.innermost.get_parameter("weight")
        is_wide = trained.dtype in (torch.float32, torch.float64)
        return is_wide and (gain.dtype == trained.dtype or self.takes_wide_gain)

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
        # What one run keeps is kept anyway. The kernels of torch keep two numbers for a second run,
        # a mean and a standard deviation.
        return Cost(kept=0 if self.dg is None or self._runs_once() else 2)


def _is_observed(norm: nn.Module) -> bool:
    """Return whether a norm has a hook, or a forward of its own."""
    hooks = (
        norm._forward_hooks,
        norm._forward_pre_hooks,
        norm._backward_hooks,
        norm._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(norm)


def _multiplies_by_one_plus_weight(norm: nn.Module, width: int) -> bool:
    """Return whether a norm multiplies by 1 + w, judged by its output for zero parameters.

    It is computed on the CPU, because the norm may be on the meta device.
    """
    zeros = {name: torch.zeros(p.shape) for name, p in norm.named_parameters()}
    row = torch.arange(float(width))[None]
    output: Tensor = torch.func.functional_call(norm, zeros, (row,))
    return bool(output.any())


@torch.no_grad()
def _takes_wide_gain(norm: nn.Module, width: int) -> bool:
    """Return whether a norm in half precision computes the same bits with its tensors in float32.

    It does if it rounds before it multiplies. The norms of torch take no tensors of another dtype
    on every device. The output is computed on the CPU, as above, for drawn numbers.
    """
    dtype = norm.get_parameter("weight").dtype
    if isinstance(norm, LNTune.accepts) or dtype not in (torch.float16, torch.bfloat16):
        return False
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(8, width, generator=random).to(dtype)
    drawn = {
        name: (1 + torch.randn(p.shape, generator=random)).to(dtype)
        for name, p in norm.named_parameters()
    }
    wide = {name: value.float() for name, value in drawn.items()}
    narrow_output: Tensor = torch.func.functional_call(norm, drawn, (rows,))
    wide_output: Tensor = torch.func.functional_call(norm, wide, (rows,))
    return narrow_output.dtype == dtype and torch.equal(wide_output.to(dtype), narrow_output)
