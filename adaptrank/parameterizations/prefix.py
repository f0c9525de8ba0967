"""Prefix: trained keys and values before the first token of every layer."""

import functools
import inspect
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError, UserTypeError
from adaptrank._options import NOT_NEGATIVE, POSITIVE
from adaptrank.parameterizations.base import Parameterization
from adaptrank.parameterizations.module import ModuleWrapper
from adaptrank.parameterizations.tensor_kinds import TensorKind


class Prefix(ModuleWrapper):
    """Attention over [P_k, K] and [P_v, V] in every layer: T trained keys and values come first.

    It wraps the body of a causal transformer (LlamaModel, GPT2Model), `targets: all`. Within a call
    the prefix is the beginning of the cache of keys and values, the mask is longer by T, and tokens
    stand at positions from T on. So `generate` works, beams included, and adapters inside of the
    body do, too.

    Training does not start at the base, because a prefix takes a share of every softmax. It does
    not merge, because it is no change of a weight. There is no rank axis: the cost is fixed. In
    models with rotary positions a prefix key is used as it is, after rotation. A model with learned
    positions has T fewer of them. Gradient checkpointing drops the cache and is refused.

    Source: prefix-tuning, arXiv:2101.00190, and its released code for GPT-2. There the table is as
        wide as the model, and the hidden layer 512. Here both have the width e. There and in HF
        PEFT the deviation of the start is 1, which `std=1` gives. Sizes and learning rates are this
        library's choice. Others use 10 to 30 tokens and 1e-2, or 1e-3 with an encoder.
    Shapes: P (L, 2, h, T, d) for L layers of h key-value heads of width d. With an encoder
        E (T, e), and W1 (e, e), W2 (2 L h d, e) with their biases. Parameters: 2 L h T d, or
        T e + e (e + 1) + 2 L h d (e + 1).
    Args:
        tokens: length T of the prefix.
        encoder: width e of a perceptron, P = W2 tanh(W1 E), through which the prefix is trained. 0
            trains P itself.
        std: standard deviation of the normal distribution that P, or E, is drawn from.
    Raises:
        TypeError: for a body that is not causal, has an encoder beside it, or has a cache other
            than one of all keys and values.
        ValueError: if tokens < 1. The forward pass raises it for a mask of another length, a cache
            that was filled without the prefix, a sequence beyond learned positions, and gradient
            checkpointing.
    """

    source = "arXiv:2101.00190"
    ranges: ClassVar = {"encoder": NOT_NEGATIVE, "std": POSITIVE}
    mergeable = False
    starts_at_base = False
    recomputable = False
    no_decay = ("P", "E")
    kinds = {
        "P": TensorKind.PREFIXES,
        "E": TensorKind.PREFIXES,
        "encoder": TensorKind.PREFIXES,
    }

    def __init__(
        self, base: nn.Module, *, tokens: int = 8, encoder: int = 0, std: float = 0.02
    ) -> None:
        super().__init__(base)
        body: Any = self.innermost
        if reason := _unfit(body):
            raise UserTypeError(f"Prefix does not fit {type(body).__name__}: {reason}.")
        if tokens < 1:
            raise UserError(f"tokens={tokens}: a prefix has at least one token; use 10 to 30.")
        config = body.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        self.positions = _learned_positions(body)
        self.tokens, self.sizes = tokens, (config.num_hidden_layers, 2, heads, width)
        self.P = self.zeros(*self.sizes[:3], tokens, width) if not encoder else None
        self.E = self.zeros(tokens, encoder) if encoder else None
        self.encoder = None
        if encoder:
            like: Any = {"device": layers.device(body), "dtype": self.adapter_dtype}
            self.encoder = nn.Sequential(
                nn.Linear(encoder, encoder, **like),
                nn.Tanh(),
                nn.Linear(encoder, config.num_hidden_layers * 2 * heads * width, **like),
            )
        drawn = self.P if self.P is not None else self.E
        assert drawn is not None
        nn.init.normal_(drawn, std=std)

    @classmethod
    def wraps(cls, layer: nn.Module) -> bool:
        """Return whether the layer is a stack of layers with a cache, and no head."""
        head = getattr(layer, "get_output_embeddings", None)
        return (
            isinstance(getattr(getattr(layer, "config", None), "num_hidden_layers", None), int)
            and "past_key_values" in inspect.signature(layer.forward).parameters
            and callable(head)
            and head() is None
            and any(isinstance(child, nn.ModuleList) for child in layer.children())
        )

    @classmethod
    def wraps_what(cls) -> str:
        return "the body of a causal transformer"

    @classmethod
    def example(cls) -> nn.Module:
        # Like a Llama, but its norms compute in the model's own dtype. In float32 no derivative
        # could be checked.
        from transformers import Starcoder2Config, Starcoder2Model

        config = Starcoder2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            sliding_window=None,
            bos_token_id=None,
            eos_token_id=None,
            norm_epsilon=1e-5,
            residual_dropout=0.0,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            initializer_range=0.2,
        )
        return Starcoder2Model(config)

    def example_input(self, leading: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Draw (batch, 4) tokens: transformers takes two dimensions, and no empty batch."""
        body: Any = self.innermost
        batch = max(1, torch.Size(leading).numel())
        return torch.randint(body.config.vocab_size, (batch, 4), generator=random)

    def prefix(self) -> Tensor:
        """Return the prefix (L, 2, h, T, d), through the encoder if there is one."""
        if self.P is not None:
            return self.P
        assert self.encoder is not None
        rows: Tensor = self.encoder(self.E)
        return rows.view(self.tokens, *self.sizes).movedim(0, -2)

    def forward_adapted(self, *args: Any, **kwargs: Any) -> Any:
        body: Any = self.innermost
        parameters = inspect.signature(body.forward).parameters
        call: dict[str, Any] = {**dict(zip(parameters, args, strict=False)), **kwargs}
        self._check_call(call)
        given_cache = call.get("past_key_values")
        cache = self._cache(given_cache)
        inputs = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        batch, new_tokens = inputs.shape[:2]
        past_tokens = self._fill(cache, batch)
        tokens = past_tokens + new_tokens
        if call.get("attention_mask") is not None:
            call["attention_mask"] = self._mask(call["attention_mask"], batch, tokens)
        if "position_ids" in parameters:
            call["position_ids"] = self._positions(call, new_tokens)
        self._check_positions(tokens, cache.get_seq_length() - past_tokens)
        keep = call.get("use_cache")
        keep = bool(getattr(body.config, "use_cache", True) if keep is None else keep)
        output = self.base(**{**call, "past_key_values": cache, "use_cache": True})
        return output if keep or given_cache is not None else _without(output, cache)

    def _check_call(self, call: dict[str, Any]) -> None:
        """Refuse gradient checkpointing and cross-attention."""
        modules = self.innermost.modules()
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in modules):
            raise UserError(
                "Prefix needs the cache, which gradient checkpointing drops; train without it."
            )
        if call.get("encoder_hidden_states") is not None:
            raise UserError(
                "Prefix does not go with cross-attention: this call passes encoder_hidden_states."
            )

    def _check_positions(self, tokens: int, prefix_tokens: int) -> None:
        """Refuse a sequence that is longer than the learned positions, prefix included."""
        if self.positions is None or prefix_tokens + tokens <= self.positions:
            return
        raise UserError(
            f"{tokens} tokens and a prefix of {prefix_tokens} do not fit the {self.positions} "
            f"learned positions of {type(self.innermost).__name__}; use at most "
            f"{self.positions - prefix_tokens} tokens, or a shorter prefix."
        )

    def _cache(self, given: Any) -> Any:
        """Return the given cache of keys and values, or a new one."""
        from transformers import DynamicCache

        body: Any = self.innermost
        cache = DynamicCache(config=body.config) if given is None else given
        if not isinstance(cache, DynamicCache):
            raise UserError(
                f"Prefix fills a DynamicCache, not a {type(cache).__name__}; leave "
                f"cache_implementation out."
            )
        return cache

    def _fill(self, cache: Any, batch: int) -> int:
        """Begin the cache with the prefix, unless an earlier call did.

        Returns:
            the number of tokens in the cache, without prefixes.
        """
        length = cache.get_seq_length()
        # Wrapper id -> length of its prefix. Several prefixes stand in a row.
        prefixes: dict[int, int] = cache.__dict__.setdefault("adaptrank_prefixes", {})
        if id(self) in prefixes:
            return int(length - sum(prefixes.get(id(wrapper), 0) for wrapper in self.nest))
        if length != sum(prefixes.values()):
            raise UserError(
                f"This cache holds {length} positions that were computed without the prefix; start "
                f"with an empty one."
            )
        prefixes[id(self)] = self.tokens
        for index, (keys, values) in enumerate(self.prefix().to(layers.dtype(self.innermost))):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return int(length)

    def _mask(self, mask: Any, batch: int, tokens: int) -> Tensor:
        """Return an attention mask (batch, tokens) that covers the prefix, too."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise UserError(
                "Prefix extends masks of shape (batch, tokens), not prepared ones; leave that to "
                "the model."
            )
        if mask.shape[1] != tokens:
            raise UserError(
                f"The attention mask covers {mask.shape[1]} positions, and there are {tokens} "
                f"tokens; it must cover the tokens, those in the cache included, and not the "
                f"prefix."
            )
        return torch.cat([mask.new_ones(batch, self.tokens), mask], 1)

    def _positions(self, call: dict[str, Any], new_tokens: int) -> Tensor | None:
        """Return the positions of the new tokens, behind the prefix.

        They are the given positions shifted, or those of the mask. None lets the model take the
        length of the cache.
        """
        given: Tensor | None = call.get("position_ids")
        mask: Tensor | None = call.get("attention_mask")
        if given is not None:
            return given + self.tokens
        if mask is None:
            return None
        # The mask covers the prefix already, so its positions count.
        return (mask.long().cumsum(-1) - 1).clamp(min=self.tokens)[:, -new_tokens:]

    def definition(self, *args: Any, **kwargs: Any) -> Any:
        """Compute every attention by hand over the prefix and the tokens, without a cache.

        The batch must have no padding.
        """
        (tokens,) = args
        body: Any = self.innermost
        prefixes = []
        for wrapper in reversed(self.nest):
            if isinstance(wrapper, Prefix) and wrapper.enabled:
                prefixes.append(wrapper.prefix())
        joined = torch.cat(prefixes, -2)
        attentions = [module for module in body.modules() if layers.attends(module)]
        with ExitStack() as routes:
            for module, (keys, values) in zip(attentions, joined, strict=True):
                attend = functools.partial(_attend, keys, values)
                routes.enter_context(layers.attending(module, attend))
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + joined.shape[-2]
            return body(tokens, position_ids=positions, use_cache=False)


def _attend(
    first_keys: Tensor,
    first_values: Tensor,
    original: Any,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scaling: float,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute softmax(q [P_k, k]^T) [P_v, v].

    Each token sees the whole prefix, and the tokens up to itself.
    """
    rows = len(q)
    groups = q.shape[1] // k.shape[1]
    k = torch.cat([first_keys.expand(rows, -1, -1, -1), k], -2).repeat_interleave(groups, 1)
    v = torch.cat([first_values.expand(rows, -1, -1, -1), v], -2).repeat_interleave(groups, 1)
    pairs = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    sees = pairs.tril(first_keys.shape[-2])
    weights = (scaling * q @ k.mT).masked_fill(~sees, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2), None


def _unfit(body: Any) -> str | None:
    """Return why a stack of layers cannot have a prefix, or None if it can."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = body.config
    if (
        config.is_encoder_decoder
        or hasattr(config, "num_decoder_layers")
        or getattr(config, "add_cross_attention", False)
    ):
        return "encoder-decoders keep two caches; use a decoder-only model"
    if any(getattr(part, "is_causal", True) is False for part in (config, *body.modules())):
        return "its tokens see those after them; use a causal language model"
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    if len(kinds) != config.num_hidden_layers or any(kind is not DynamicLayer for kind in kinds):
        return (
            "some of its layers keep a window or a state rather than all keys and values; use a "
            "model with full attention"
        )
    return None


def _learned_positions(body: Any) -> int | None:
    """Return the number of learned positions, or None if the model has no table of them."""
    longest = getattr(body.config, "max_position_embeddings", None)
    if longest is None:
        return None
    tokens = body.get_input_embeddings()
    tokens = tokens.innermost if isinstance(tokens, Parameterization) else tokens
    tables = [m for m in body.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return int(longest) if any(table.num_embeddings >= longest for table in tables) else None


def _without(output: Any, cache: object) -> Any:
    """Return a model's output without the cache, which the caller did not ask for."""
    if isinstance(output, tuple):
        return tuple(value for value in output if value is not cache)
    return type(output)(**{name: value for name, value in output.items() if value is not cache})
