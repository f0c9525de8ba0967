"""A tokenizer's vocabulary and chat template, and the rows of a model's embedding."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from adaptrank._errors import UserError
from adaptrank.backbones.silence import silenced


def embedding_rows(model: Any) -> int | None:
    """Return the number of rows of a model's input embedding, or None if it has none."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        weight = None if find is None else getattr(find(), "weight", None)
    # Of a model that reads no tokens.
    except (AttributeError, NotImplementedError):
        return None
    # The weight of a convolution over an image has four dimensions.
    return None if weight is None or weight.dim() != 2 else int(weight.shape[0])


def add_embedding_rows(model: Any, tokenizer: Any, rows: int) -> None:
    """Give a model's embedding and its head as many rows as there are tokens.

    The new rows are drawn around the mean of the others, the same ones every time.

    Raises:
        UserError: if the tokenizer does not have so many tokens.
    """
    import torch

    present = embedding_rows(model)
    if present is None or rows <= present:
        return
    if rows > len(tokenizer):
        raise UserError(
            f"{rows:,} tokens are asked for, and the tokenizer has {len(tokenizer):,}: it is not "
            f"the tokenizer of training."
        )
    weight = model.get_input_embeddings().weight
    # Their mean and covariance are read, which a model without weights does not have.
    with silenced(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=not weight.is_meta)


def before_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """Return the token ids before the first end token."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[:position]
    return ids


def embedding_paths(model: Any) -> list[str]:
    """Return the paths of a model's input embedding and of its output embedding."""
    embeddings = set()
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            embeddings.add(id(find()))
        # Of a model that reads no tokens.
        except (AttributeError, NotImplementedError):
            continue
    return [path for path, module in model.named_modules() if id(module) in embeddings]


def chat_template_of(tokenizer: Any) -> str | None:
    """Return the chat template that a tokenizer uses without a name, or None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
