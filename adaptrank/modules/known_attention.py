"""Attention of a batch whose padding is known on the host, so that nothing has to look for it.

Before a forward pass transformers asks the device whether a mask (rows, length) hides anything. If
it does not, the mask is dropped, and a faster kernel computes the attention. Here the question is
answered by the host, and transformers gets no mask, or one that it takes as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank.modules.batch_keys import token_shape
from adaptrank.modules.model_losses import has_own_terms
from adaptrank.modules.packed_rows import wraps_single_layers
from adaptrank.modules.padding_free import registered_attention, sees_all_earlier

ENCODERS = frozenset({"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"})
"""Model types of transformers in which a mask hides padding from attention and does nothing else.

The tests compare each with itself under the plain mask.
"""
KEYS = frozenset({"attention_mask", "input_ids", "inputs_embeds", "token_type_ids"})
"""Inputs beside which the mask (rows, length) is all that says who sees whom."""
LOOKS_FOR_PADDING = frozenset({"gpt2"})
"""Model types that read the tokens if there is a padding token and no mask, and warn about it."""


@contextmanager
def known_attention(
    inputs: Mapping[str, Any], host: Mapping[str, Any], model: Any
) -> Iterator[Any]:
    """Within the block, let a model compute these inputs without a look at their mask.

    The result is what the model computes anyway. Models and inputs for which that is not known are
    left alone.

    Args:
        inputs: inputs of the model.
        host: the batch, with its values on the host where they are known there.
        model: a model of transformers, or its body.
    Yields:
        The inputs to call the model with.
    """
    host_mask = host.get("attention_mask")
    if not _is_known(inputs, host_mask, model):
        yield inputs
        return
    tokens = token_shape(inputs)[1]
    if _sees_every_token(model):
        visible = None
        if not _hides_nothing(host_mask):
            visible = (inputs["attention_mask"] != 0)[:, None, None, :].expand(-1, 1, tokens, -1)
        yield {**inputs, "attention_mask": visible}
    elif not sees_all_earlier(model, tokens):
        yield inputs
    elif _hides_nothing(host_mask):
        with registered_attention(model, _causal_attention):
            yield {**inputs, "attention_mask": None}
    else:
        mask = inputs["attention_mask"] != 0
        earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
        yield {**inputs, "attention_mask": (earlier & mask[:, None, :])[:, None]}


def _is_known(inputs: Mapping[str, Any], host_mask: Tensor | None, model: Any) -> bool:
    """Tell whether the host knows the mask, and the mask is all that the model looks at."""
    mask = inputs.get("attention_mask")
    if not hasattr(model, "config") or not inputs.keys() <= KEYS:
        return False
    if model.config.model_type in LOOKS_FOR_PADDING or _compiles_again(model):
        return False
    if (mask is None) != (host_mask is None):
        return False
    if host_mask is not None and (host_mask.dim() != 2 or host_mask.device.type != "cpu"):
        return False
    return not has_own_terms(model) and wraps_single_layers(model) and not _is_watched(model)


def _is_watched(model: nn.Module) -> bool:
    """Tell whether a hook may look for the mask among the arguments of a module."""
    return any(
        module._forward_pre_hooks_with_kwargs or module._forward_hooks_with_kwargs
        for module in model.modules()
    )


def _compiles_again(model: nn.Module) -> bool:
    """Tell whether a block is compiled, and computed again in the backward pass.

    There the attention is that of the configuration, so the block would have another graph.
    """
    return any(
        getattr(module, "gradient_checkpointing", False) and module._compiled_call_impl is not None
        for module in model.modules()
    )


def _hides_nothing(host_mask: Tensor | None) -> bool:
    return host_mask is None or bool((host_mask != 0).all())


def _sees_every_token(model: Any) -> bool:
    """Tell whether each token sees all others, by attention that takes a mask of booleans."""
    config = model.config
    is_encoder = getattr(config, "model_type", None) in ENCODERS and not getattr(
        config, "is_decoder", False
    )
    return is_encoder and config._attn_implementation == "sdpa"


def _causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> Any:
    """Call transformers' attention without a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **kwargs)
