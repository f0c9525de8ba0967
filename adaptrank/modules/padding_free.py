"""A padded batch as one row of its tokens, so that nothing is computed for padding.

In flow the body of a causal language model and a batch (rows, tokens) with its mask, out come the hidden states of the tokens that are
no padding. Every layer treats a token by itself but attention, which is taken example by example.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank.parameterizations import wrappers

# fmt: off
MODEL_TYPES = frozenset({
    "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
})
# fmt: on
"""Of models in transformers whose tokens meet in attention and nowhere else; the tests hold each to its padded self."""

_NAME = "adaptrank_examples"
_SHORT = 64
"""Mean tokens of a row below which attention example by example costs more than one call with a mask; tried on one CPU, and not tuned."""


def fits(body: nn.Module, mask: Tensor) -> bool:
    """Whether a batch with this mask (rows, tokens) has padding, on the right, and is better given to the body as one row of its tokens.

    Short rows need a quarter of padding to be worth it. The body is a model of `MODEL_TYPES` that attends by PyTorch's
    `scaled_dot_product_attention` and, at this length, to every earlier token, without a dropout of its own; its wrappers are around
    single layers, not around attention or more, and serve every row; and no block is computed a second time in the backward pass,
    when nobody would tell it where examples begin.
    """
    config: Any = getattr(body, "config", None)
    if (
        getattr(config, "model_type", None) not in MODEL_TYPES
        or config._attn_implementation != "sdpa"
    ):
        return False
    window = getattr(config, "sliding_window", None)
    again = any(getattr(module, "gradient_checkpointing", False) for module in body.modules())
    drops = body.training and any(
        "drop" in key and value for key, value in config.to_dict().items()
    )
    if again or drops or (window is not None and window < mask.shape[1]):
        return False
    for wrapper in wrappers(body):
        if wrapper.rows is not None or any(True for _ in wrapper.innermost.children()):
            return False
    begins_again, tokens = mask[:, 1:] & ~mask[:, :-1], mask.sum()
    worth = (tokens < 0.75 * mask.numel()) | ((tokens >= _SHORT * len(mask)) & ~mask.all())
    return bool(worth & ~begins_again.any())


def hidden_states(body: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states of the tokens under the mask, example after example: (n, d), n = mask.sum().

    The dropouts of adapters draw what they would draw for the padded batch.

    Args:
        body: one that `fits`.
        input_ids: (rows, tokens).
        mask: (rows, tokens), true on tokens and false on padding.
    """
    positions = (mask.cumsum(1) - 1)[mask]
    with _by_example(body, mask):
        output = body(
            input_ids=input_ids[mask][None], position_ids=positions[None], use_cache=False
        )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


@contextmanager
def _by_example(body: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within, attention in the body is taken over pieces of the rows' lengths; transformers makes no masks for it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = list(body.modules())
    found: list[Any] = [getattr(module, "config", None) for module in modules]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    dropouts = [
        module
        for module in modules
        if isinstance(module, nn.Dropout) and module.p and module.training
    ]
    lengths = [length for length in mask.sum(1).tolist() if length]
    ALL_ATTENTION_FUNCTIONS[_NAME] = functools.partial(_attention, lengths)
    for config in configs.values():
        config._attn_implementation_internal = _NAME  # the property would write into nested configs
    for dropout in dropouts:
        dropout.forward = functools.partial(_dropped, dropout, mask)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for dropout in dropouts:
            del dropout.forward


def _attention(
    lengths: list[int],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Of q (1, heads, n, width), as (1, n, heads, width)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    pieces = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **more)[0] for q, k, v in pieces]
    return torch.cat(outputs, 1), None


def _dropped(dropout: nn.Dropout, mask: Tensor, x: Tensor) -> Tensor:
    """Of x (1, n, ...)."""
    drawn = F.dropout(x.new_ones(*mask.shape, *x.shape[2:]), dropout.p)
    return x * drawn[mask]
