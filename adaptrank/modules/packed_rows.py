"""Attention of a batch whose rows hold several examples: no token sees another example.

Position ids that begin again, boundaries in the words of flash attention, or a mask (B, 1, T, T)
say where an example begins. A mask (B, T) that a data collator adds out of habit hides the position
ids from transformers, which looks for examples only where there is no mask. So mask and positions
become one mask (B, 1, T, T) here.
"""

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.modules.batch_keys import BOUNDARY_KEYS, takes, token_shape
from adaptrank.modules.model_losses import has_own_terms
from adaptrank.parameterizations import wrappers

Inputs = dict[str, Any]


def attention_inputs(inputs: Mapping[str, Any], model: Any, host: Mapping[str, Any]) -> Inputs:
    """Return inputs under which this model keeps the examples of a row apart.

    Args:
        inputs: inputs of a causal language model, with the keys of flash attention, too.
        model: a causal language model of transformers.
        host: the same inputs with their values on the host, where they are known there. What
            depends on a value is decided by these.

    Raises:
        UserError: if the model would drop what a key says.
    """
    ready = {key: value for key, value in inputs.items() if key not in BOUNDARY_KEYS}
    mask = ready.get("attention_mask")
    has_boundaries = len(ready) < len(inputs)
    if mask is not None and mask.dim() != 2:
        if has_boundaries:
            raise UserError("The batch has a 4-D attention_mask and boundaries. Give one of them.")
        ready["attention_mask"] = _prepared_mask(mask, inputs, model)
        return ready
    positions = ready.get("position_ids")
    if positions is not None and positions.dim() != 2:
        if has_boundaries:
            raise UserError(
                "The batch has position_ids in several dimensions and boundaries. Give one of them."
            )
        return ready
    if positions is None and not has_boundaries:
        return ready
    segments = _segments(inputs, host) if has_boundaries else None
    return _apart(ready, segments, model, host)


def _apart(ready: Inputs, segments: Tensor | None, model: Any, host: Mapping[str, Any]) -> Inputs:
    """Return inputs under which the model keeps the examples of a row apart."""
    positions, mask = ready.get("position_ids"), ready.get("attention_mask")
    rows, length = token_shape(ready)
    if not _separates(model):
        # A recurrent layer carries its state from one example to the next.
        if segments is not None:
            _refuse("boundaries of examples", model)
        if positions is not None and _restarts(host["position_ids"], mask is not None):
            _refuse("position_ids that begin again", model)
        return ready
    # Transformers keeps examples apart by itself where nothing but positions tells them apart.
    told_by_positions = mask is None and (segments is None or positions is None)
    if positions is None:
        assert segments is not None
        positions = ready["position_ids"] = _positions_of(segments.diff(dim=-1) != 0)
    starts = positions.diff(dim=-1) != 1
    if segments is not None:
        starts = starts | (segments.diff(dim=-1) != 0)
    takes_dense_mask = _takes_dense_mask(model, length)
    if told_by_positions and reads_positions(model, rows):
        # It asks the device whether there are several. Where the host knows, it is told.
        is_known = takes_dense_mask and _are_known_to_start(host.get("position_ids"))
        if not is_known:
            return ready
    if takes_dense_mask:
        ready["attention_mask"] = _for_attention(_dense_mask(starts, mask, rows), model)
    elif reads_positions(model, rows) and (mask is None or _hides_nothing(host)):
        ready["attention_mask"] = None
        ready["position_ids"] = _positions_of(starts) if segments is not None else positions
    elif segments is not None or _restarts(host["position_ids"], mask is not None):
        _refuse("several packed rows" if mask is None else "packed rows with padding", model)
    return ready


def _are_known_to_start(positions: Tensor | None) -> bool:
    """Tell whether positions on the host say that a row has several examples."""
    if positions is None or positions.device.type != "cpu":
        return False
    return bool((positions.diff(dim=-1) != 1).any())


def _hides_nothing(host: Mapping[str, Any]) -> bool:
    return bool((host["attention_mask"] != 0).all())


def _segments(inputs: Mapping[str, Any], host: Mapping[str, Any]) -> Tensor:
    """Return the number of the example that each token belongs to, (rows, T)."""
    rows, length = token_shape(inputs)
    if "seq_idx" in inputs:
        return inputs["seq_idx"]  # type: ignore[no-any-return]
    key = "cu_seq_lens_q" if "cu_seq_lens_q" in inputs else "cu_seq_lens_k"
    starts = inputs.get(key)
    if starts is None:
        raise UserError(
            "The batch has max_length_q or max_length_k, and no cu_seq_lens_q that says where its "
            "examples begin. Give cu_seq_lens_q or position_ids."
        )
    # Flash attention counts the tokens of all rows, one row after the other.
    tokens = torch.arange(rows * length, device=starts.device)
    ends = starts[1:].to(tokens.dtype)
    if not len(ends) or int(host[key][-1]) != rows * length:
        raise UserError(
            f"The batch's cu_seq_lens_q does not end at its {rows * length} tokens. Give the "
            f"boundaries of all rows, one after the other, from 0 to {rows * length}."
        )
    return torch.bucketize(tokens, ends, right=True).view(rows, length)


def _positions_of(starts: Tensor) -> Tensor:
    """Return positions that begin again where an example starts.

    Args:
        starts: (rows, T - 1), whether the second token and those after it start an example.
    """
    first = torch.nn.functional.pad(starts, (1, 0), value=True)
    tokens = torch.arange(first.shape[-1], device=starts.device).expand_as(first)
    return tokens - torch.where(first, tokens, 0).cummax(-1).values


def _dense_mask(starts: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """Return which key each query sees, (rows, 1, T, T): earlier tokens of its example.

    A token always sees itself, so that no row of a softmax is empty.

    Args:
        starts: (rows or 1, T - 1), whether the second token and those after it start an example.
        mask: (rows, T), 0 on padding, or None.
        rows: number of rows.
    """
    example = torch.nn.functional.pad(starts, (1, 0)).cumsum(-1)
    sees = (example[:, :, None] == example[:, None, :]).tril()
    if mask is not None:
        sees = sees & (mask != 0)[:, None, :]
    itself = torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)
    return (sees | itself)[:, None].expand(rows, 1, -1, -1)


def _prepared_mask(mask: Tensor, inputs: Mapping[str, Any], model: Any) -> Tensor:
    """Return a mask (B, 1, T, T) of the user in the form that the model's attention reads."""
    rows, length = token_shape(inputs)
    fits = mask.dim() == 4 and mask.shape[0] in (1, rows) and mask.shape[-2:] == (length, length)
    if not fits:
        raise UserError(
            f"The batch's attention_mask has the shape {tuple(mask.shape)}. Give "
            f"({rows}, {length}) or ({rows}, 1, {length}, {length})."
        )
    reads_it = _attention_name(model) in ("sdpa", "eager") and not has_own_terms(model)
    if not (_separates(model) and reads_it):
        raise UserError(
            f"{type(model).__name__} with attention {_attention_name(model)!r} cannot read an "
            "attention_mask of four dimensions. Give one of shape (rows, tokens), or position_ids."
        )
    if not mask.is_floating_point():
        mask = mask != 0
    return _for_attention(mask, model)


def _for_attention(mask: Tensor, model: Any) -> Tensor:
    """Return a mask as the attention reads it: eager attention adds it to the logits."""
    dtype = _embedding_dtype(model)
    if mask.is_floating_point():
        return mask.to(dtype)
    if _attention_name(model) == "sdpa":
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)


def _embedding_dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = next(model.get_input_embeddings().parameters()).dtype
    return dtype


# ---- which models


def _attention_name(model: Any) -> str:
    return str(getattr(_text_config(model), "_attn_implementation", None))


def _text_config(model: Any) -> Any:
    """Return the configuration of the language model, which a multimodal one nests."""
    return model.config.get_text_config()


def _separates(model: Any) -> bool:
    """Tell whether tokens meet in attention only, and whether a mask can separate examples there.

    It takes positions, its attention masks are those of transformers' `create_causal_mask`, and no
    layer carries a state along the row. ALiBi is computed from a mask (rows, tokens).
    """
    if not takes(model, "position_ids") or getattr(model.config, "alibi", False):
        return False
    body = getattr(model, model.base_model_prefix or "", model)
    modules = [sys.modules.get(type(part).__module__) for part in (model, body)]
    masks = any(hasattr(module, "create_causal_mask") for module in modules)
    config = _text_config(model)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    only_attention = all("attention" in kind and "linear" not in kind for kind in kinds or ())
    return masks and only_attention and not getattr(model, "_is_stateful", False)


def _takes_dense_mask(model: Any, length: int) -> bool:
    """Tell whether one mask (B, 1, T, T) serves all layers at this length."""
    config = _text_config(model)
    bounds = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    reaches = all(bound is None or bound >= length for bound in bounds)
    # The balance of experts is computed from a mask (rows, tokens).
    reads_it = _attention_name(model) in ("sdpa", "eager") and not has_own_terms(model)
    return reaches and reads_it


def reads_positions(model: nn.Module, rows: int) -> bool:
    """Tell whether the attention of a model separates examples by positions that begin again.

    Flash attention does it for a single row. An attention that transformers does not know has no
    mask, and separates nothing.

    Args:
        model: a model that `_separates`.
        rows: number of rows of the batch.
    """
    name = _attention_name(model)
    by_mask = name in ("sdpa", "eager", "flex_attention")
    is_flash = "flash" in name and rows == 1
    return wraps_single_layers(model) and (by_mask or is_flash)


def check_packing(model: nn.Module, rows: int, length: int) -> None:
    """Raise if a model cannot keep the examples of packed rows apart.

    Args:
        model: a causal language model of transformers.
        rows: number of rows of a batch.
        length: tokens of a row.

    Raises:
        UserError: naming the model and its attention.
    """
    if _separates(model):
        if _takes_dense_mask(model, length) or reads_positions(model, rows):
            return
        if rows > 1 and reads_positions(model, 1):
            raise UserError(
                f"{type(model).__name__} with attention {_attention_name(model)!r} keeps the "
                f"examples of one packed row apart, and a batch has {rows}. Set data.batch_size: 1 "
                f"and trainer.accumulate_grad_batches: {rows}."
            )
    raise UserError(
        f"{type(model).__name__} with attention {_attention_name(model)!r} does not keep the "
        "examples of a packed row apart. Leave out data.packing."
    )


def wraps_single_layers(model: nn.Module) -> bool:
    """Tell whether no wrapper surrounds a whole attention, which may bring a cache of its own."""
    return not any(list(wrapper.innermost.children()) for wrapper in wrappers(model))


def _restarts(positions: Tensor, has_mask: bool) -> bool:
    """Tell whether positions begin again within a row.

    Args:
        positions: (rows, T).
        has_mask: whether there may be padding, all of whose positions may be the same.
    """
    steps = positions.diff(dim=-1)
    return bool((steps < 0 if has_mask else steps != 1).any())


def _refuse(what: str, model: Any) -> NoReturn:
    raise UserError(
        f"The batch has {what}, and {type(model).__name__} with attention "
        f"{_attention_name(model)!r} does not keep the examples of a row apart. Give each example "
        "a row of its own, padded, with an attention_mask."
    )
