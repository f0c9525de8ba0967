"""Cross entropy of a frozen linear head, without its logits.

For a small model with a large vocabulary, the head and the loss are most of a step, and the logits
most of its memory: in float32 and with their gradient, (tokens, vocabulary) twice. Here the logits
exist for some tokens at a time only. The gradient of the hidden states is computed at once, and is
all that is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
"""Bytes of float32 logits at a time, by device.

On a CPU this is what its cache holds. On a GPU it is larger, because each chunk is a launch. That
value was not measured.
"""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """Return -log softmax(W h + b)[target] of each token, (T,), in float32 or better.

    This is `F.cross_entropy` of the float32 logits.

    Args:
        hidden: (T, d).
        weight: (V, d), frozen.
        bias: (V,), frozen, or None.
        targets: (T,), each within [0, V).
    """
    return _HeadLoss.apply(hidden, weight, bias, targets)  # type: ignore[no-any-return, no-untyped-call]


def plain_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """Compute `linear_cross_entropy` by its definition, with all logits at once."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none"
    )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        device = hidden.device.type
        ctx.save_for_backward(hidden, weight, bias, targets)
        # Cast once here, and not again for each chunk.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            half = torch.get_autocast_dtype(device)
            weight, hidden = weight.to(half), hidden.to(half)
            bias = None if bias is None else bias.to(half)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden), len(weight) * exact.itemsize, device):
            target = targets[rows, None]
            logp = torch.log_softmax(F.linear(hidden[rows], weight, bias), -1, dtype=exact)
            losses[rows] = -logp.gather(1, target).squeeze(1)
            if grad is not None:
                p = logp.exp_()
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=exact))
                grad[rows] = p.to(hidden.dtype) @ weight
        ctx.grad = grad
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (hidden, weight, bias, targets) = grads, ctx.saved_tensors
        # A second derivative is computed by the definition.
        if torch.is_grad_enabled():
            losses = plain_cross_entropy(hidden, weight, bias, targets)
            return torch.autograd.grad(losses, hidden, g, create_graph=True)[0], None, None, None
        return (ctx.grad * g[:, None]).to(hidden.dtype), None, None, None


def _chunks(tokens: int, row_bytes: int, device: str) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // row_bytes)
    for start in range(0, tokens, size):
        yield slice(start, start + size)
