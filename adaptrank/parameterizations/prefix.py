"""Prefix: trained keys and values before the first token of every layer."""

import functools
import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError, UserTypeError
from adaptrank.parameterizations.base import Parameterization


class Prefix(Parameterization):
    """Attention over [P_k, K] and [P_v, V] in every layer: T trained keys and values before those of the tokens.

    It wraps the body of a causal transformer (LlamaModel, GPT2Model), `targets: all`: within a call the prefix is the beginning of
    the cache of keys and values, the mask is longer by T, and tokens stand at positions from T on. So `generate` works, beams
    included, and adapters inside of the body too. There is no start at the base, for a prefix takes a share of every softmax; no merge, for
    it is no change of a weight; and no rank axis: the cost is fixed. In models with rotary positions a prefix key is used as it is, after rotation.
    A model with learned positions has T fewer of them. Gradient checkpointing drops the cache and is refused.

    Source: prefix-tuning, arXiv:2101.00190 (recalled; sizes, start and learning rates are this library's choice; others use 10 to 30
    tokens and 1e-2, or 1e-3 with an encoder).
    Shapes: P (L, 2, h, T, d) for L layers of h key-value heads of width d; with an encoder E (T, e), and W1 (e, e), W2 (2 L h d, e) with their
    biases. Parameters: 2 L h T d, or T e + e (e + 1) + 2 L h d (e + 1).
    Args:
        tokens: length T of the prefix.
        encoder: width e of a perceptron, P = W2 tanh(W1 E), through which the prefix is trained; 0 trains P itself.
        std: of the normal distribution that P, or E, is drawn from.
    Raises:
        TypeError: for a body that is not causal, has an encoder beside it, or a cache other than one of all keys and values.
        ValueError: if tokens < 1; later, for a mask of another length, a cache that was filled without the prefix, a sequence beyond learned
            positions, and gradient checkpointing.
    """

    source = "arXiv:2101.00190"
    mergeable = False
    starts_at_base = False
    no_decay = ("P", "E")

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
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.positions = _learned_positions(body)
        self.tokens, self.sizes = tokens, (config.num_hidden_layers, 2, heads, width)
        self.P = self.zeros(*self.sizes[:3], tokens, width) if not encoder else None
        self.E = self.zeros(tokens, encoder) if encoder else None
        like: Any = {"device": layers.device(body), "dtype": self.adapter_dtype}
        self.encoder = (
            nn.Sequential(
                nn.Linear(encoder, encoder, **like),
                nn.Tanh(),
                nn.Linear(encoder, config.num_hidden_layers * 2 * heads * width, **like),
            )
            if encoder
            else None
        )
        drawn = self.P if self.P is not None else self.E
        assert drawn is not None
        nn.init.normal_(drawn, std=std)

    @classmethod
    def wraps(cls, layer: nn.Module) -> bool:
        """Whether it is a stack of layers with a cache, and no head."""
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
        # Like a Llama, but its norms compute in the model's own dtype: in float32 no derivative could be checked.
        from transformers import Starcoder2Config, Starcoder2Model

        config = Starcoder2Config(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, sliding_window=None, bos_token_id=None, eos_token_id=None, norm_epsilon=1e-5,
            residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0, initializer_range=0.2,
        )  # fmt: skip
        return Starcoder2Model(config)

    def example_input(self, leading: tuple[int, ...], random: torch.Generator) -> Tensor:
        """(batch, 4) tokens: transformers takes two dimensions, and no empty batch."""
        body: Any = self.innermost
        return torch.randint(
            body.config.vocab_size, (max(1, torch.Size(leading).numel()), 4), generator=random
        )

    def prefix(self) -> Tensor:
        """(L, 2, h, T, d), through the encoder where there is one."""
        if self.P is not None:
            return self.P
        assert self.encoder is not None
        rows: Tensor = self.encoder(self.E)
        return rows.view(self.tokens, *self.sizes).movedim(0, -2)

    def adapted(self, *args: Any, **kwargs: Any) -> Any:
        body: Any = self.innermost
        parameters = inspect.signature(body.forward).parameters
        call: dict[str, Any] = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if self.training and any(
            getattr(m, "gradient_checkpointing", False) for m in body.modules()
        ):
            raise UserError(
                "Prefix needs the cache, which gradient checkpointing drops; train without it."
            )
        if call.get("encoder_hidden_states") is not None:
            raise UserError(
                "Prefix does not go with cross-attention: this call passes encoder_hidden_states."
            )
        given = call.get("past_key_values")
        cache = self._cache(given)
        seen = cache.get_seq_length()
        inputs = next(
            call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None
        )
        batch, new = inputs.shape[:2]
        past = self._fill(cache, seen, batch)
        if call.get("attention_mask") is not None:
            call["attention_mask"] = self._mask(call["attention_mask"], batch, past + new)
        if "position_ids" in parameters:
            call["position_ids"] = self._positions(call, new)
        longest = self.positions
        if longest is not None and cache.get_seq_length() + new > longest:
            raise UserError(
                f"{past + new} tokens and a prefix of {cache.get_seq_length() - past} do not fit the {longest} learned positions of "
                f"{type(body).__name__}; use at most {longest - cache.get_seq_length() + past} tokens, or a shorter prefix."
            )
        keep = call.get("use_cache")
        keep = bool(getattr(body.config, "use_cache", True) if keep is None else keep)
        output = self.base(**{**call, "past_key_values": cache, "use_cache": True})
        return output if keep or given is not None else _without(output, cache)

    def _cache(self, given: Any) -> Any:
        from transformers import DynamicCache

        body: Any = self.innermost
        cache = DynamicCache(config=body.config) if given is None else given
        if not isinstance(cache, DynamicCache):
            raise UserError(
                f"Prefix fills a DynamicCache, not a {type(cache).__name__}; leave cache_implementation out."
            )
        return cache

    def _fill(self, cache: Any, seen: int, batch: int) -> int:
        """Begin the cache with the prefix, unless it did so at an earlier call; the number of tokens in it beside this prefix."""
        begun: dict[int, int] = cache.__dict__.setdefault(
            "adaptrank_prefixes", {}
        )  # several prefixes stand in a row
        if id(self) in begun:
            return seen - sum(begun.get(id(wrapper), 0) for wrapper in self.nest)
        if seen != sum(begun.values()):
            raise UserError(
                f"This cache holds {seen} positions that were computed without the prefix; start with an empty one."
            )
        begun[id(self)] = self.tokens
        for index, (keys, values) in enumerate(self.prefix().to(layers.dtype(self.innermost))):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return seen

    def _mask(self, mask: Any, batch: int, tokens: int) -> Tensor:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise UserError(
                "Prefix extends masks of shape (batch, tokens), not prepared ones; leave that to the model."
            )
        if mask.shape[1] != tokens:
            raise UserError(
                f"The attention mask covers {mask.shape[1]} positions, and there are {tokens} tokens; it must cover the tokens, those in "
                f"the cache included, and not the prefix."
            )
        return torch.cat([mask.new_ones(batch, self.tokens), mask], 1)

    def _positions(self, call: dict[str, Any], new: int) -> Tensor | None:
        """Positions of the new tokens: those given, or those of the mask, shifted by the prefix; None is the cache's length."""
        given: Tensor | None = call.get("position_ids")
        mask: Tensor | None = call.get("attention_mask")
        if given is not None:
            return given + self.tokens
        if mask is None:
            return None
        return (mask.long().cumsum(-1) - 1).clamp(min=self.tokens)[
            :, -new:
        ]  # of the longer mask: the prefix counts

    def definition(self, *args: Any, **kwargs: Any) -> Any:
        """The same without a cache: every attention is computed by hand over the prefix and the tokens of a batch without padding."""
        (tokens,) = args
        body: Any = self.innermost
        prefixes = [
            wrapper.prefix()
            for wrapper in reversed(self.nest)
            if isinstance(wrapper, Prefix) and wrapper.enabled
        ]
        joined = torch.cat(prefixes, -2)
        with ExitStack() as routes:
            for index, module in enumerate(
                module for module in body.modules() if layers.attends(module)
            ):
                routes.enter_context(
                    layers.attending(module, functools.partial(_attend, *joined[index]))
                )
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
    """softmax(q [P_k, k]^T) [P_v, v]: each token sees the whole prefix, and the tokens up to itself."""
    rows = len(q)
    groups = q.shape[1] // k.shape[1]
    k = torch.cat([first_keys.expand(rows, -1, -1, -1), k], -2).repeat_interleave(groups, 1)
    v = torch.cat([first_values.expand(rows, -1, -1, -1), v], -2).repeat_interleave(groups, 1)
    sees = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(
        first_keys.shape[-2]
    )
    weights = (scaling * q @ k.mT).masked_fill(~sees, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2), None


def _unfit(body: Any) -> str | None:
    """Why a stack of layers cannot have a prefix, or None where it can."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = body.config
    if (
        config.is_encoder_decoder
        or hasattr(config, "num_decoder_layers")
        or getattr(config, "add_cross_attention", False)
    ):
        return "encoder-decoders keep two caches; use a decoder-only model"
    if any(getattr(one, "is_causal", True) is False for one in (config, *body.modules())):
        return "its tokens see those after them; use a causal language model"
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    if len(kinds) != config.num_hidden_layers or any(kind is not DynamicLayer for kind in kinds):
        return "some of its layers keep a window or a state rather than all keys and values; use a model with full attention"
    return None


def _learned_positions(body: Any) -> int | None:
    """How many positions a model with a table of them has."""
    longest, tokens = (
        getattr(body.config, "max_position_embeddings", None),
        body.get_input_embeddings(),
    )
    if longest is None:
        return None
    tokens = tokens.innermost if isinstance(tokens, Parameterization) else tokens
    tables = [m for m in body.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return int(longest) if any(table.num_embeddings >= longest for table in tables) else None


def _without(output: Any, cache: object) -> Any:
    """A model's output without the cache, which the caller did not ask for."""
    if isinstance(output, tuple):
        return tuple(value for value in output if value is not cache)
    return type(output)(**{name: value for name, value in output.items() if value is not cache})
