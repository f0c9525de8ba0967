"""Replace the inner function of transformers' attention modules, for one forward pass."""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""Signature of an attention function in transformers.

(module, query, key, value, mask, **more) -> (output, weights or None), with an output of shape
(batch, queries, heads, width).
"""

QUERIES = ("q_proj", "query", "q_lin", "q", "q_attn")
"""Names of a separate query projection in attention modules."""
FUSED_QUERIES = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv")
"""Names of a projection that holds queries, keys and values."""

_ROUTE = "adaptrank"


def attends(layer: nn.Module) -> bool:
    """Return whether the module is an attention of transformers whose function can be replaced.

    Such a module looks its attention function up in a table.
    """
    return (
        "Attention" in type(layer).__name__
        and hasattr(getattr(layer, "config", None), "num_attention_heads")
        and hasattr(sys.modules[type(layer).__module__], "ALL_ATTENTION_FUNCTIONS")
        and any(name in layer._modules for name in (*QUERIES, *FUSED_QUERIES))
    )


@contextmanager
def attending(layer: nn.Module, function: Attention) -> Iterator[None]:
    """Replace the attention function of a module within the context.

    The module computes `function(original, module, query, key, value, mask, **more)`, where
    `original` is the function that it would have used: sdpa, flash or eager. The model still makes
    the masks, and sees no difference.
    """
    # Imported here, because it is slow to import and few methods need it.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = layer.config
    eager: Any = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)
    original = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, eager)
    ALL_ATTENTION_FUNCTIONS[_ROUTE] = _call_route
    routed_config = copy.copy(config)
    # The public property would write into nested configurations, which are shared.
    routed_config._attn_implementation_internal = _ROUTE
    routed_config._adaptrank_attention = functools.partial(function, original)
    layer.config = routed_config
    try:
        yield
    finally:
        layer.config = config


def routed(layer: nn.Module) -> bool:
    """Return whether the module is within a context of `attending` already."""
    return bool(cast(Any, layer).config._attn_implementation == _ROUTE)


def _call_route(module: nn.Module, *args: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
    function: Attention = cast(Any, module).config._adaptrank_attention
    return function(module, *args, **more)
