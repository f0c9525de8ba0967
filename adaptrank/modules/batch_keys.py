"""Keys of a batch: each one is used or refused by name, and none is dropped in silence."""

import inspect
from collections.abc import Collection, Hashable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError, UserTypeError, did_you_mean

IGNORED = -100
"""Label of tokens and examples that are not trained on."""

BOUNDARY_KEYS = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
)
"""Keys that say where the examples of a packed row begin, in the words of flash attention."""

# fmt: off
CONTROLS = frozenset({
    "self", "labels", "past_key_values", "use_cache", "cache_position", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep",
    "num_logits_to_keep",
})
# fmt: on
"""Arguments of a model's forward that are no inputs of a batch."""


def read_inputs(
    batch: Any, model: nn.Module, beside: Collection[str] = (), more: Collection[str] = ()
) -> dict[str, Any]:
    """Return the entries of a batch that the model reads, which are all but its labels.

    Args:
        batch: mapping of keys to tensors.
        model: a model of transformers.
        beside: keys that the caller reads itself.
        more: further keys that the caller turns into inputs of the model.

    Raises:
        UserTypeError: if the batch is no mapping.
        UserError: naming the key that the model does not read, or the input that is missing.
    """
    batch = entries(batch)
    known = {*forward_keys(type(model)), *more}
    inputs = {key: value for key, value in batch.items() if key not in {"labels", *beside}}
    foreign = [key for key in inputs if key not in known]
    if foreign:
        fitting = ", ".join(sorted({*known, "labels"}))
        raise UserError(
            f"The batch has a key {foreign[0]!r}, which {type(model).__name__} does not read."
            f"{did_you_mean(foreign[0], {*known, 'labels'})} Keys that fit: {fitting}. Leave "
            "others out in the collate_fn."
        )
    _check_main_input(inputs, getattr(model, "main_input_name", "input_ids"))
    return inputs


def entries(batch: Any) -> dict[str, Any]:
    """Return the entries of a batch that are not None.

    Raises:
        UserTypeError: if the batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise UserTypeError(
            f"A batch is a mapping with the keys input_ids and labels, and this one is a "
            f"{type(batch).__name__}. Give the DataLoader a collate_fn that returns a dict."
        )
    return {key: value for key, value in batch.items() if value is not None}


def read_labels(batch: Any) -> Tensor:
    """Return the labels of a batch.

    Raises:
        UserError: if it has none.
    """
    batch = entries(batch)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        keys = ", ".join(map(str, batch)) or "none"
        raise UserError(f"The batch has no tensor 'labels' to train on. Its keys: {keys}.")
    return labels


def check_shapes(inputs: Mapping[str, Any], labels: Tensor) -> None:
    """Check that labels, mask and positions belong to the tokens of a causal language model.

    Raises:
        UserError: naming the key and both shapes.
    """
    rows, length = token_shape(inputs)
    if labels.dim() != 2:
        raise UserError(
            "CausalLM needs a label for each token, (rows, tokens), and got labels of shape "
            f"{tuple(labels.shape)}. Use a data module of completions, such as CausalLMData, "
            "or the module SequenceClassification."
        )
    fitting: dict[str, list[tuple[int, ...]]] = {
        "labels": [(rows, length)],
        "attention_mask": [(rows, length)],
        "position_ids": [(rows, length), (1, length)],
        "token_type_ids": [(rows, length)],
    }
    for key, shapes in fitting.items():
        value = labels if key == "labels" else inputs.get(key)
        if not isinstance(value, Tensor) or _is_of_another_kind(key, value):
            continue
        if tuple(value.shape) not in shapes:
            raise UserError(
                f"The batch's {key} has the shape {tuple(value.shape)}, and its tokens have "
                f"{(rows, length)}. Give each token one entry."
            )


def token_shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of rows and of tokens in a row."""
    ids = inputs.get("input_ids")
    if ids is not None:
        if ids.dim() != 2:
            raise UserError(
                f"The batch's input_ids has the shape {tuple(ids.shape)}. Give (rows, tokens)."
            )
        return ids.shape[0], ids.shape[1]
    embeds = inputs["inputs_embeds"]
    if embeds.dim() != 3:
        raise UserError(
            f"The batch's inputs_embeds has the shape {tuple(embeds.shape)}. Give (rows, tokens, "
            "width)."
        )
    return embeds.shape[0], embeds.shape[1]


def forward_keys(model_class: type) -> frozenset[str]:
    """Return the inputs that the forward of a model names, without its controls."""
    return _arguments(cast(Hashable, model_class)) - CONTROLS


def takes(model: nn.Module, argument: str) -> bool:
    """Tell whether the forward of a model names an argument."""
    return argument in _arguments(cast(Hashable, type(model)))


@cache
def _arguments(model_class: Hashable) -> frozenset[str]:
    """Return the arguments that the forward of a class of models names."""
    forward = cast(type[nn.Module], model_class).forward
    parameters = inspect.signature(forward).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(p.name for p in parameters if p.kind not in kinds)


def count_supervised(labels: Tensor) -> Tensor:
    """Return the number of labels that are trained on, on the device.

    Labels of a regression are floating-point numbers. None of them is left out.
    """
    if labels.is_floating_point():
        return torch.full((), labels.numel(), device=labels.device)
    return (labels != IGNORED).sum()


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _is_of_another_kind(key: str, value: Tensor) -> bool:
    """Tell whether a value has a form of its own: a mask or positions in several dimensions."""
    return key in ("attention_mask", "position_ids") and value.dim() > 2


def _check_main_input(inputs: Mapping[str, Any], main: str) -> None:
    """Check that a batch has what its model reads first: for a text one of two forms of it.

    Args:
        inputs: inputs of the model.
        main: name of the first input, such as input_ids or pixel_values.
    """
    if main != "input_ids":
        if inputs.get(main) is None:
            keys = ", ".join(map(str, inputs)) or "none"
            raise UserError(f"The batch has no {main}. Its keys beside labels: {keys}.")
        return
    given = [key for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None]
    if len(given) == 1:
        return
    if given:
        raise UserError("The batch has both input_ids and inputs_embeds. Give one of the two.")
    keys = ", ".join(map(str, inputs)) or "none"
    raise UserError(f"The batch has no input_ids. Its keys beside labels: {keys}.")
