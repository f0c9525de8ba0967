"""AttentionScale: a trained factor on the logits of an attention."""

import functools
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank._options import COUNT
from adaptrank.parameterizations.base import Cost, Parameterization
from adaptrank.parameterizations.formula import formula
from adaptrank.parameterizations.module import ModuleWrapper
from adaptrank.parameterizations.tensor_kinds import TensorKind
from adaptrank.parameterizations.traits import StudiedRate


class AttentionScale(ModuleWrapper):
    """softmax((1 + da) * Z + mask) V: a trained factor on the logits of every attention.

    Z = Q K^T / sqrt(width of a head). It wraps attention modules of transformers, `targets: all`.
    The factor is applied before the mask. There is no rank axis: the cost is fixed.

    "scalar" trains one number for each head. The number multiplies the queries, so sdpa and flash
    attention stay in use. Training starts at the module to the last bit, and the factor merges into
    the query projection.

    "lite" trains a number for each pair of positions, "full" for each pair and head. Both fix the
    number n of positions, which suits images of one size and no text. They compute the attention by
    hand, start at the module up to rounding, and do not merge.

    Source: AttnScale, arXiv:2304.01917 (abstract). The three shapes, and that the factor comes
        before the softmax, are recalled or chosen, not read.
    Shapes: da (h, 1, 1), (1, n, n) or (h, n, n) for h heads. Parameters: h, n^2 or h n^2.
    Args:
        form: "scalar", "lite" or "full".
        tokens: number n of positions, of "lite" and "full". For images these are the patches and
            one for the class token.
    Raises:
        ValueError: if lite or full are not told the number of tokens, or scalar is. The forward
            pass raises it for another number of positions.
    """

    source = "arXiv:2304.01917"
    studied_rate = StudiedRate(5e-2, "docs/results/study_methods_at_defaults.md")
    ranges: ClassVar = {"tokens": COUNT}
    no_decay = ("da",)
    kinds = {"da": TensorKind.SCALES}

    def __init__(
        self,
        base: nn.Module,
        *,
        form: Literal["scalar", "lite", "full"] = "scalar",
        tokens: int | None = None,
    ) -> None:
        super().__init__(base)
        plain: Any = self.innermost
        heads = int(plain.config.num_attention_heads)
        if form not in ("scalar", "lite", "full"):
            raise UserError(
                f"form={form!r} is none of AttentionScale's; use 'scalar', 'lite' or 'full'."
            )
        if form == "scalar" and tokens is not None:
            raise UserError(f"AttentionScale(form='scalar', tokens={tokens}): leave tokens out.")
        if form != "scalar" and tokens is None:
            raise UserError(
                f"AttentionScale(form={form!r}, tokens=None): say tokens=197 for a ViT of 14x14 "
                f"patches, for example."
            )
        self.form, self.tokens = form, tokens
        n = tokens or 1
        self.da = self.zeros(1 if form == "lite" else heads, n, n)
        self.starts_at_base = form == "scalar"
        self.mergeable = form == "scalar" and _has_separate_queries(plain, heads)

    @classmethod
    def wraps(cls, layer: nn.Module) -> bool:
        return layers.attends(layer)

    @classmethod
    def wraps_what(cls) -> str:
        return "attention modules of transformers"

    @classmethod
    def example(cls) -> nn.Module:
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertSelfAttention

        config = BertConfig(hidden_size=24, num_attention_heads=3, attention_probs_dropout_prob=0.0)
        config._attn_implementation = "sdpa"
        return BertSelfAttention(config)  # type: ignore[no-untyped-call]

    def example_input(self, leading: tuple[int, ...], random: torch.Generator) -> Tensor:
        """(batch, n, width): transformers' attention takes three dimensions, and no empty batch."""
        plain: Any = self.innermost
        size = (max(1, torch.Size(leading).numel()), self.tokens or 4, plain.config.hidden_size)
        return torch.randn(size, generator=random, dtype=torch.float64).to(layers.dtype(plain))

    def _query_name(self) -> str:
        """Return the name of the separate query projection, or "" if the module has none."""
        return next((name for name in layers.QUERIES if name in self.innermost._modules), "")

    @property
    def base_weight(self) -> Tensor:
        """The weight of the query projection, (m, n)."""
        if self._given_weight is not None:
            return self._given_weight
        if isinstance(self.base, Parameterization):
            return self.base.dense()
        query = self.innermost.get_submodule(self._query_name())
        return layers.dense(query, self.adapter_dtype)

    @formula
    def weight(self) -> Tensor:
        return self._scale_heads(self.base_weight)

    def _scale_heads(self, values: Tensor) -> Tensor:
        """Scale the rows of the query projection, which belong to the heads one after the other."""
        heads = values.view(len(self.da), -1, *values.shape[1:])
        return (heads * (1 + self.da.view(-1, *[1] * values.dim()))).flatten(0, 1)

    def merged(self) -> dict[str, Tensor]:
        inner = self.base.merged() if isinstance(self.base, Parameterization) else {}
        if not self.enabled:
            return inner
        path = self._query_name()
        query = self.innermost.get_submodule(path)
        if isinstance(query, Parameterization):
            raise UserError(
                f"AttentionScale folds into {path}, which still carries {type(query).__name__}; "
                f"merge the whole model, which folds that one first."
            )
        if layers.quantized(query):
            raise UserError(
                f"AttentionScale folds into {path}, which is quantized; merge on the unquantized "
                f"base."
            )
        values = {**inner, f"{path}.weight": layers.stored(query, self.dense())}
        bias = inner.get(f"{path}.bias", getattr(query, "bias", None))
        if bias is not None:
            values[f"{path}.bias"] = self._scale_heads(bias.to(self.da.dtype))
        return values

    def definition(self, *args: Any, **kwargs: Any) -> Any:
        if all(wrapper.mergeable for wrapper in self.nest):
            return super().definition(*args, **kwargs)
        factor = functools.reduce(torch.mul, [1 + scale.da for scale in self._enabled_scales()])
        plain = self.innermost
        values = {name: p.to(self.adapter_dtype) for name, p in plain.named_parameters()}
        with layers.attending(plain, functools.partial(_attention_by_hand, factor)):
            return torch.func.functional_call(plain, values, args, kwargs)

    def _enabled_scales(self) -> "list[AttentionScale]":
        """Return the wrappers of the nest that are on. Their factors multiply, in any form."""
        return [
            wrapper
            for wrapper in self.nest
            if isinstance(wrapper, AttentionScale) and wrapper.enabled
        ]

    def forward_adapted(self, *args: Any, **kwargs: Any) -> Any:
        # The outermost wrapper of a nest computes for all of them.
        if layers.routed(self.innermost):
            return self.base(*args, **kwargs)
        scaled = functools.partial(_scaled_attention, self._enabled_scales())
        with layers.attending(self.innermost, scaled):
            return self.base(*args, **kwargs)

    def cost(self) -> Cost | None:
        name = self._query_name()
        if self.form != "scalar" or not name:
            return None
        return Cost(kept=layers.shape(_innermost(self.innermost.get_submodule(name)))[0])


def _innermost(layer: nn.Module) -> nn.Module:
    return layer.innermost if isinstance(layer, Parameterization) else layer


def _has_separate_queries(module: nn.Module, heads: int) -> bool:
    """Return whether a factor on the queries can be folded into their projection.

    Queries must come from a layer of their own, and reach the logits with nothing but rotations in
    between.
    """
    name = next((name for name in layers.QUERIES if name in module._modules), None)
    query = None if name is None else _innermost(module.get_submodule(name))
    if not isinstance(query, layers.LINEAR):
        return False
    is_normed = any("norm" in child for child in module._modules)
    is_clipped = getattr(getattr(module, "config", None), "clip_qkv", None) is not None
    if is_normed or is_clipped:
        return False
    width = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
    m = layers.shape(query)[0]
    return m == heads * width if isinstance(width, int) else m % heads == 0


def _scaled_attention(
    scales: list[AttentionScale],
    original: Any,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    **more: Any,
) -> Any:
    """Compute the attention with these factors on its logits, for q (batch, h, queries, width)."""
    factor: Tensor | None = None
    for scale in scales:
        if scale.form == "scalar":
            # The deviation is rounded, not the factor, because bf16 is coarse near 1.
            q = torch.addcmul(q, q, scale.da.to(q.dtype))
            continue
        n = scale.tokens
        if (q.shape[-2], k.shape[-2]) != (n, n):
            raise UserError(
                f"AttentionScale(form={scale.form!r}) holds {n}x{n} pairs of positions, and this "
                f"attention has {q.shape[-2]}x{k.shape[-2]}; use form='scalar' where lengths vary."
            )
        factor = 1 + scale.da if factor is None else factor * (1 + scale.da)
    if factor is None:
        return original(module, q, k, v, mask, **more)
    return _attention_by_hand(factor, original, module, q, k, v, mask, **more)


def _attention_by_hand(
    factor: Tensor,
    original: Any,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(factor * Z + mask) V, one step after the other."""
    _check_attention_arguments(mask, more)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.promote_types(q.dtype, factor.dtype)
    logits = factor * (scaling * q @ k.mT).to(dtype)
    if position_bias is not None:
        logits = logits + position_bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and q.shape[-2] > 1 and causal:
        pairs = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
        mask = pairs.tril(k.shape[-2] - q.shape[-2])
    if mask is not None:
        logits = _masked(logits, mask[..., : k.shape[-2]])
    weights = F.dropout(logits.softmax(-1).to(q.dtype), dropout, module.training)
    return (weights @ v).transpose(1, 2).contiguous(), weights


def _check_attention_arguments(mask: Any, more: dict[str, Any]) -> None:
    """Refuse arguments that the attention by hand would ignore, or a mask that it cannot read."""
    unknown = [name for name in ("softcap", "s_aux") if more.get(name) is not None]
    is_short = isinstance(mask, Tensor) and mask.dim() < 4
    if unknown or is_short or not isinstance(mask, Tensor | None):
        shape = tuple(getattr(mask, "shape", ()))
        cause = unknown[0] if unknown else f"mask of shape {shape}"
        raise UserError(
            f"AttentionScale computes lite and full by hand, and knows no {cause}; load the model "
            f"with sdpa, or use form='scalar'."
        )


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Apply a boolean or an additive mask to logits that are multiplied by their factor already.

    A factor of zero, or below it, would turn minus infinity into no number. The least finite number
    is used instead, so that a row that is masked whole has no row of minus infinities either.
    """
    least = torch.finfo(logits.dtype).min
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, least)
    return logits + mask.to(logits.dtype).clamp(min=least)
