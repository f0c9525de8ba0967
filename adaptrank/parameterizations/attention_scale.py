"""AttentionScale: a trained factor on the logits of an attention."""

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.parameterizations.base import Cost, Parameterization


class AttentionScale(Parameterization):
    """softmax((1 + da) * Z + mask) V with the logits Z = Q K^T / sqrt(width of a head): a trained factor on every attention.

    It wraps attention modules of transformers, `targets: all`. "scalar" trains one number a head; it multiplies the queries, so
    sdpa and flash attention go on being used, it starts at the module to the last bit, and it merges into the query projection.
    "lite" trains a number for each pair of positions, "full" for each pair and head; both fix the number n of positions, which suits
    images of one size and no text, compute the attention by hand, start at the module up to rounding, and do not merge.
    The factor is applied before the mask. There is no rank axis: the cost is fixed.

    Source: AttnScale, arXiv:2304.01917 (abstract; the three shapes, and that the factor comes before the softmax, are recalled or chosen, not read).
    Shapes: da (h, 1, 1), (1, n, n) or (h, n, n) for h heads. Parameters: h, n^2 or h n^2.
    Args:
        form: "scalar", "lite" or "full".
        tokens: number n of positions, of "lite" and "full": for images the patches and one for the class token.
    Raises:
        ValueError: if lite or full are not told the number of tokens, or scalar is; later, for another number of positions.
    """

    source = "arXiv:2304.01917"
    no_decay = ("da",)

    def __init__(
        self,
        base: nn.Module,
        *,
        form: Literal["scalar", "lite", "full"] = "scalar",
        tokens: int | None = None,
    ) -> None:
        super().__init__(base)
        plain, heads = self.innermost, self._heads()
        if form not in ("scalar", "lite", "full"):
            raise UserError(
                f"form={form!r} is none of AttentionScale's; use 'scalar', 'lite' or 'full'."
            )
        if (form == "scalar") != (tokens is None):
            say = (
                "leave tokens out"
                if form == "scalar"
                else "say tokens=197 for a ViT of 14x14 patches, for example"
            )
            raise UserError(f"AttentionScale(form={form!r}, tokens={tokens}): {say}.")
        self.form, self.tokens = form, tokens
        n = tokens or 1
        self.da = self.zeros(1 if form == "lite" else heads, n, n)
        self.starts_at_base = form == "scalar"
        self.mergeable = form == "scalar" and _separate(plain, heads)

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

    def _heads(self) -> int:
        plain: Any = self.innermost
        return int(plain.config.num_attention_heads)

    def _query(self) -> str:
        return next((name for name in layers.QUERIES if name in self.innermost._modules), "")

    @property
    def base_weight(self) -> Tensor:
        if isinstance(self.base, Parameterization):
            return self.base.dense()
        return layers.dense(self.innermost.get_submodule(self._query()), self.adapter_dtype)

    @property
    def weight(self) -> Tensor:
        # Of the query projection: its rows are the heads', one after the other.
        return self._rows(self.base_weight)

    def _rows(self, values: Tensor) -> Tensor:
        heads = values.view(len(self.da), -1, *values.shape[1:])
        return (heads * (1 + self.da.view(-1, *[1] * values.dim()))).flatten(0, 1)

    def merged(self) -> dict[str, Tensor]:
        inner = self.base.merged() if isinstance(self.base, Parameterization) else {}
        if not self.enabled:
            return inner
        query, path = self.innermost.get_submodule(self._query()), self._query()
        if isinstance(query, Parameterization):
            raise UserError(
                f"AttentionScale folds into {path}, which still carries {type(query).__name__}; merge the whole model, which "
                f"folds that one first."
            )
        if layers.quantized(query):
            raise UserError(
                f"AttentionScale folds into {path}, which is quantized; merge on the unquantized base."
            )
        values = {**inner, f"{path}.weight": layers.stored(query, self.dense())}
        bias = inner.get(f"{path}.bias", getattr(query, "bias", None))
        if bias is not None:
            values[f"{path}.bias"] = self._rows(bias.to(self.da.dtype))
        return values

    def definition(self, *args: Any, **kwargs: Any) -> Any:
        if all(wrapper.mergeable for wrapper in self.nest):
            return super().definition(*args, **kwargs)
        factor = functools.reduce(torch.mul, [1 + scale.da for scale in self._scales()])
        plain = self.innermost
        values = {name: p.to(self.adapter_dtype) for name, p in plain.named_parameters()}
        with layers.attending(plain, functools.partial(_by_hand, factor)):
            return torch.func.functional_call(plain, values, args, kwargs)

    def _scales(self) -> "list[AttentionScale]":
        """Those of the nest that are on: their factors multiply, whatever their forms."""
        return [
            wrapper
            for wrapper in self.nest
            if isinstance(wrapper, AttentionScale) and wrapper.enabled
        ]

    def adapted(self, *args: Any, **kwargs: Any) -> Any:
        if layers.routed(self.innermost):  # the outermost of a nest computes for all
            return self.base(*args, **kwargs)
        with layers.attending(self.innermost, functools.partial(_scaled, self._scales())):
            return self.base(*args, **kwargs)

    def cost(self) -> Cost | None:
        width = (
            layers.shape(_plain(self.innermost.get_submodule(self._query())))[0]
            if self._query()
            else None
        )
        return Cost(kept=width) if self.form == "scalar" and width else None


def _plain(layer: nn.Module) -> nn.Module:
    return layer.innermost if isinstance(layer, Parameterization) else layer


def _separate(module: nn.Module, heads: int) -> bool:
    """Whether queries come from a layer of their own, and reach the logits with nothing but rotations in between."""
    name = next((name for name in layers.QUERIES if name in module._modules), None)
    query = None if name is None else _plain(module.get_submodule(name))
    if not isinstance(query, layers.LINEAR):
        return False
    width = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
    normed = any("norm" in child for child in module._modules)
    clipped = getattr(getattr(module, "config", None), "clip_qkv", None) is not None
    m = layers.shape(query)[0]
    return (
        not normed
        and not clipped
        and (m == heads * width if isinstance(width, int) else m % heads == 0)
    )


def _scaled(
    scales: list[AttentionScale],
    original: Any,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    **more: Any,
) -> Any:
    """What the attention computes with these factors on its logits; q (batch, h, queries, width)."""
    factor: Tensor | None = None
    for scale in scales:
        if scale.form == "scalar":
            q = torch.addcmul(
                q, q, scale.da.to(q.dtype)
            )  # the deviation is rounded, not the factor: near 1 bf16 is coarse
            continue
        n = scale.tokens
        if (q.shape[-2], k.shape[-2]) != (n, n):
            raise UserError(
                f"AttentionScale(form={scale.form!r}) holds {n}x{n} pairs of positions, and this attention has {q.shape[-2]}x{k.shape[-2]}; "
                f"use form='scalar' where lengths vary."
            )
        factor = 1 + scale.da if factor is None else factor * (1 + scale.da)
    if factor is None:
        return original(module, q, k, v, mask, **more)
    return _by_hand(factor, original, module, q, k, v, mask, **more)


def _by_hand(
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
    """softmax(factor * Z + mask) V, one step after the other."""
    odd = [name for name in ("softcap", "s_aux") if more.get(name) is not None]
    if odd or (isinstance(mask, Tensor) and mask.dim() < 4) or not isinstance(mask, Tensor | None):
        what = odd[0] if odd else f"mask of shape {tuple(getattr(mask, 'shape', ()))}"
        raise UserError(
            f"AttentionScale computes lite and full by hand, and knows no {what}; load the model with sdpa, or use form='scalar'."
        )
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.promote_types(q.dtype, factor.dtype)
    logits = factor * (scaling * q @ k.mT).to(dtype)
    if position_bias is not None:
        logits = logits + position_bias
    if (
        mask is None
        and q.shape[-2] > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(
            k.shape[-2] - q.shape[-2]
        )
    # After the factor: a factor of zero, or below it, on minus infinity would be no number. And a row that is masked whole must
    # not be one of minus infinities either.
    least = torch.finfo(dtype).min
    if mask is not None:
        mask = mask[..., : k.shape[-2]]
        logits = (
            logits.masked_fill(~mask, least)
            if mask.dtype == torch.bool
            else logits + mask.to(dtype).clamp(min=least)
        )
    weights = F.dropout(logits.softmax(-1).to(q.dtype), dropout, module.training)
    return (weights @ v).transpose(1, 2).contiguous(), weights
