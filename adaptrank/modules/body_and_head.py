"""Tell whether a causal language model is a body and a plain head, and nothing more.

The loss of such a model can be computed from the body's hidden states, without logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptrank.modules.forward_replacement import replaced_forwards
from adaptrank.ops.low_rank import plain

PROBE_TOKENS = 3


def separable_body(model: Any) -> nn.Module | None:
    """Return the body of a model whose logits are head(body(...).last_hidden_state), else None.

    The model itself is asked: it is called once, with a body that returns given hidden states. If
    it returns what its head makes of them, it does nothing in between. Models that scale or cap
    their logits return something else. The head must be a frozen linear layer.

    Args:
        model: a causal language model of transformers.
    """
    body = getattr(model, model.base_model_prefix or "model", None)
    head = model.get_output_embeddings()
    weight_and_bias = plain(head)
    if not isinstance(body, nn.Module) or body is model or weight_and_bias is None:
        return None
    weight = weight_and_bias[0]
    hidden = torch.linspace(
        -1, 1, PROBE_TOKENS * weight.shape[1], device=weight.device, dtype=weight.dtype
    ).view(1, PROBE_TOKENS, -1)
    return body if _only_applies_head(model, body, head, hidden) else None


@torch.no_grad()
def _only_applies_head(model: Any, body: nn.Module, head: Any, hidden: Tensor) -> bool:
    """Tell whether the model's logits are head(hidden) when its body returns `hidden`.

    Args:
        model: the model to probe.
        body: its body, which is not computed.
        head: its output embeddings.
        hidden: (1, tokens, d).
    """
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    try:
        with replaced_forwards([(body, _constant_body(hidden))]):
            if hidden.is_meta:
                return _operations(model, input_ids=tokens) == _operations(head, hidden)
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return torch.equal(logits, head(hidden))
    # The model reads more of its body's output than the last hidden state.
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


class _Computing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that compute something, and no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not operation.is_view:
            self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def _operations(module: Any, *args: Any, **kwargs: Any) -> list[str]:
    """Return the operations of a call. Without values, they tell what a model does."""
    computing = _Computing()
    with computing:
        module(*args, **kwargs)
    return computing.names


def _constant_body(hidden: Tensor) -> Callable[..., Any]:
    """Return a forward whose output holds these hidden states, whatever the input."""
    from transformers.modeling_outputs import BaseModelOutput

    class LastHiddenState(BaseModelOutput):
        """Output of a body without caches, router logits and other fields, which read as None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    def forward(*args: Any, **kwargs: Any) -> LastHiddenState:
        return LastHiddenState(last_hidden_state=hidden)

    return forward
