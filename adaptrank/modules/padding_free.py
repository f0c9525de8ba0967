"""Give the body of a causal language model only the tokens of a batch, and none of its padding.

A padded batch (rows, tokens) becomes one row of its tokens, example after example. Every layer
treats a token by itself except attention, which is computed example by example.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrank.modules.forward_replacement import replaced_forwards
from adaptrank.parameterizations import Parameterization, wrappers
from adaptrank.training.moving import to_device

# fmt: off
MODEL_TYPES = frozenset({
    "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "phi",
    "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
})
# fmt: on
"""Model types of transformers whose tokens meet in attention and nowhere else.

The tests compare each with its padded self.
"""

ATTENTION_NAME = "adaptrank_examples"
"""Name by which transformers finds an attention function of ours during one call of a model."""

SHORT_ROW = 64
"""Mean tokens per row below which attention example by example costs more than one masked call.

The number was tried on one CPU, and not tuned.
"""


# ---- which models and batches


def fits(body: nn.Module, mask: Tensor) -> bool:
    """Tell whether a body is better given a batch with this mask as one row of its tokens.

    Args:
        body: the body of a causal language model.
        mask: (rows, tokens), true on tokens and false on padding. It is read where it is.
    """
    return _body_fits(body, mask.shape[1]) and _mask_fits(mask)


def sees_all_earlier(model: nn.Module, tokens: int) -> bool:
    """Tell whether each token of a row sees all earlier ones, and nothing else counts its place.

    The model is one of `MODEL_TYPES` that attends by PyTorch's `scaled_dot_product_attention`, and
    at this length to every earlier token.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in MODEL_TYPES:
        return False
    if config._attn_implementation != "sdpa":
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or window >= tokens


def _body_fits(body: nn.Module, tokens: int) -> bool:
    """Tell whether attention example by example replaces the mask of this body.

    Each token sees all earlier ones. The body has no active dropout of its own. Its wrappers
    surround single layers and serve every row. No block is computed again in the backward pass,
    where nothing would say how long the examples are.
    """
    config: Any = getattr(body, "config", None)
    if not sees_all_earlier(body, tokens):
        return False
    if any(getattr(module, "gradient_checkpointing", False) for module in body.modules()):
        return False
    if body.training and _has_dropout(config):
        return False
    return all(_treats_tokens_alike(wrapper) for wrapper in wrappers(body))


def _has_dropout(config: Any) -> bool:
    return any("drop" in key and value for key, value in config.to_dict().items())


def _treats_tokens_alike(wrapper: Parameterization) -> bool:
    """Tell whether a wrapper surrounds a single layer, and serves every row of the batch."""
    return wrapper.rows is None and not any(True for _ in wrapper.innermost.children())


def _mask_fits(mask: Tensor) -> bool:
    """Tell whether a mask has padding, on the right only, and enough of it.

    Short rows need a quarter of padding to be worth it.
    """
    tokens = mask.sum()
    has_much_padding = tokens < 0.75 * mask.numel()
    has_long_rows = (tokens >= SHORT_ROW * len(mask)) & ~mask.all()
    restarts = mask[:, 1:] & ~mask[:, :-1]
    return bool((has_much_padding | has_long_rows) & ~restarts.any())


# ---- the computation


def hidden_states(body: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the last hidden states of the tokens under the mask, (n, d) with n = mask.sum().

    The dropouts of adapters draw the random numbers that they would draw for the padded batch.

    Args:
        body: a body that `fits`.
        input_ids: (rows, tokens).
        mask: (rows, tokens), true on tokens and false on padding. Where it is on the host the
            device is not read.
    """
    device = input_ids.device
    positions = to_device((mask.cumsum(1) - 1)[mask], device)
    tokens = to_device(mask.flatten().nonzero().squeeze(1), device)
    lengths = [length for length in mask.sum(1).tolist() if length]
    dropouts = _padded_dropouts(body, mask.shape, tokens)
    attention = partial(attention_by_example, lengths)
    with registered_attention(body, attention), replaced_forwards(dropouts):
        output = body(
            input_ids=input_ids.flatten().index_select(0, tokens)[None],
            position_ids=positions[None],
            use_cache=False,
        )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


@contextmanager
def registered_attention(model: nn.Module, attention: Callable[..., Any]) -> Iterator[None]:
    """Within the block, let the attention modules of a model call this attention function.

    Transformers looks an attention function up by the name in the configuration. The function is
    registered under a name of its own, and the configurations in the model name it. Transformers
    makes no mask for a name that it does not know, and reads none. On exit the earlier names are
    back and the function is unregistered.

    What the function has to know beside its arguments is bound to it, because not every model hands
    keywords on to its attention modules (StableLM does not).
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    earlier = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = attention
        # The property without "_internal" would also write into nested configurations.
        for config in configs.values():
            config._attn_implementation_internal = ATTENTION_NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = earlier[key]
        ALL_ATTENTION_FUNCTIONS.pop(ATTENTION_NAME)


def attention_by_example(
    lengths: list[int],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each example of one row.

    With its first argument bound, it is an attention function of transformers.

    Args:
        lengths: number of tokens of each example, n in all.
        module: the attention module.
        query: (1, heads, n, width).
        key: (1, heads, n, width).
        value: (1, heads, n, width).
        attention_mask: unused. Transformers makes none for this function.
        **kwargs: for `sdpa_attention_forward`, such as the scale.

    Returns:
        The outputs (1, n, heads, width), and None in place of attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    queries, keys, values = (torch.split(tensor, lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        output, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, 1), None


def _padded_dropouts(
    body: nn.Module, shape: torch.Size, tokens: Tensor
) -> Iterator[tuple[nn.Module, Any]]:
    """Yield each active dropout with a forward that draws for the padded batch.

    Args:
        body: the body.
        shape: (rows, length) of the padded batch.
        tokens: indices of its tokens, (n,), on the device.
    """
    for module in body.modules():
        if isinstance(module, nn.Dropout) and module.p and module.training:
            yield module, partial(_drop_as_padded, module.p, shape, tokens)


def _drop_as_padded(p: float, shape: torch.Size, tokens: Tensor, x: Tensor) -> Tensor:
    """Apply dropout to one row (1, n, ...), with numbers drawn for (rows, length, ...)."""
    drawn = F.dropout(x.new_ones(*shape, *x.shape[2:]), p)
    return x * drawn.flatten(0, 1).index_select(0, tokens)
