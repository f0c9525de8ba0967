"""Gradient checkpointing: recompute the activations of each block in the backward pass."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from adaptrank._errors import UserError, did_you_mean
from adaptrank._options import COUNT, check_number
from adaptrank.injection import ParameterizationCallable, method_of

OPTIONS = ("use_reentrant", "every_n_layers", "offload")


def read_checkpointing(given: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options of gradient checkpointing, or None where activations are kept.

    Args:
        given: true, false, or a mapping with `use_reentrant` (false), `every_n_layers` (1, of
            which one is recomputed) and `offload` (false, keep the inputs of blocks in the memory
            of the host).
    Raises:
        UserError: for an option or a value that is unknown.
    """
    if isinstance(given, bool):
        return {"use_reentrant": False} if given else None
    if not isinstance(given, Mapping):
        raise UserError(
            f"gradient_checkpointing={given!r} makes no sense. Give true, false, or options such "
            f"as {{every_n_layers: 2}}."
        )
    for option, value in given.items():
        if option not in OPTIONS:
            hint = did_you_mean(str(option), OPTIONS)
            raise UserError(
                f"gradient_checkpointing has no option {option!r}.{hint} There are "
                f"{', '.join(OPTIONS)}."
            )
        if option == "every_n_layers":
            check_number("gradient_checkpointing: every_n_layers", value, COUNT, whole=True)
        elif not isinstance(value, bool):
            raise UserError(
                f"gradient_checkpointing: {option}={value!r} makes no sense. Give true or false."
            )
    return {"use_reentrant": False, **given}


def check_recomputable(makers: Iterable[ParameterizationCallable]) -> None:
    """Refuse methods whose forward pass cannot be computed a second time.

    Raises:
        UserError: naming the method.
    """
    for maker in makers:
        method = method_of(maker)
        if not method.recomputable:
            raise UserError(
                f"{method.__name__} needs the cache of keys and values, which gradient "
                f"checkpointing drops. Leave model.gradient_checkpointing out, or take another "
                f"method."
            )


def enable_checkpointing(model: Any, options: Mapping[str, Any]) -> None:
    """Switch gradient checkpointing on in a model of transformers.

    Random numbers, such as those of dropout, are the same in the second forward pass.

    Args:
        model: the model, adapted or not.
        options: as `read_checkpointing` returns them.
    Raises:
        UserError: if the model does not support it, or transformers lacks an option.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} does not support gradient checkpointing. Leave "
            f"model.gradient_checkpointing out."
        )
    reentrant = {"use_reentrant": options["use_reentrant"]}
    others = {key: value for key, value in options.items() if key not in reentrant}
    if not torch.accelerator.is_available():
        # All memory is that of the host.
        others.pop("offload", None)
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        # The name that transformers had until 5.20.
        enable = model.gradient_checkpointing_enable
        arguments = {"gradient_checkpointing_kwargs": reentrant}
    else:
        arguments = {"activation_checkpointing_kwargs": reentrant}
    known = inspect.signature(enable).parameters
    for option in others:
        if option not in known:
            raise UserError(
                f"gradient_checkpointing: {option} needs a later transformers. Leave it out, or "
                f"type `pip install --upgrade transformers`."
            )
    enable(**arguments, **others)
    if options["use_reentrant"]:
        _require_gradients_of_inputs(model)


def _require_gradients_of_inputs(model: Any) -> None:
    """Let the output of the frozen embedding have a gradient.

    The reentrant kind computes no gradient in a block whose inputs have none.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Module):
        raise UserError(
            f"{type(model).__name__} has no input embedding, which use_reentrant: true needs. "
            f"Leave it out."
        )
    model.enable_input_require_grads()
