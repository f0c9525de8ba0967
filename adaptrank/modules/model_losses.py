"""Terms that a causal language model adds to its own loss, such as the balance of its experts.

A mixture of experts adds the load-balancing loss of its router where its configuration sets
`output_router_logits`. The model is asked for the sum of these terms: it computes its loss with a
cross entropy of zero in place of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def has_own_terms(model: Any) -> bool:
    """Tell whether the model, called as a whole, adds terms of its own to the cross entropy."""
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "output_router_logits", False) for config in configs)


@contextmanager
def own_terms_only(model: Any) -> Iterator[None]:
    """Within the block, let the model's loss be the sum of its own terms, without cross entropy."""
    earlier = vars(model).get("_loss_function")
    model.loss_function = _zero_loss
    try:
        yield
    finally:
        if earlier is None:
            del model._loss_function
        else:
            model._loss_function = earlier


def _zero_loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Models add their terms in place. In half precision that would round them.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=logits.device)
