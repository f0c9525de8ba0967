"""Adapted models in transformers' Trainer and in TRL: reference models, quantized bases."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import nn

from adaptrank._errors import UserError, some
from adaptrank.artifacts import trained_modules
from adaptrank.injection import disabled
from adaptrank.parameterizations import COUNTS_AS_ADAPTED, wrapped_layers

Model = TypeVar("Model", bound=nn.Module)


class BaseReference(nn.Module):
    """A reference model: the trained model with its adapters switched off.

    DPO and the losses like it compare log-probabilities log pi(y | x) with log pi_ref(y | x). With

        DPOTrainer(model, ref_model=BaseReference(model), ...)

    pi_ref is the base of the adapters, in evaluation mode and without gradients. It shares all
    tensors with the trained model.

    Args:
        model: a model that holds wrappers. It may be in training already.
    Raises:
        UserError: if the model has no adapter, or trains a module of the base whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not wrapped_layers(model):
            raise UserError(
                f"This {type(model).__name__} holds no adapter to switch off; call "
                f"adaptrank.adapt(model, ...) first."
            )
        if whole := trained_modules(model):
            raise UserError(
                f"{some(whole, 2)} train(s) whole, so switching adapters off does not give the "
                f"model from before training; give these modules an adapter instead of "
                f"train_modules, or load a second model as ref_model."
            )
        self.policy = model

    @property
    def config(self) -> Any:
        """Configuration of the model."""
        return self.policy.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the base. TRL replaces `forward`, which is therefore not used."""
        with torch.no_grad(), disabled(self.policy), _in_evaluation_mode(self.policy):
            return self.policy(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the base."""
        return self(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Leave the mode of the trained model as it is."""
        self.training = mode
        return self


def use_base_as_reference(trainer: Any, beta: float) -> None:
    """Give a GRPO trainer the base as its reference, and the weight of the divergence from it.

    The constructor of `GRPOTrainer` would load a second model for any other beta than 0:

        trainer = GRPOTrainer(model, reward, args=GRPOConfig(beta=0.0, ...), ...)
        use_base_as_reference(trainer, beta=0.04)

    Args:
        trainer: a trainer with the attributes `model`, `beta` and `ref_model`.
        beta: weight of the Kullback-Leibler divergence, above 0.
    Raises:
        UserError: if the trainer has a reference model already, or beta is not above 0.
    """
    name = type(trainer).__name__
    if not (hasattr(trainer, "beta") and hasattr(trainer, "ref_model")):
        raise UserError(
            f"{name} has no `beta` and no `ref_model`; this is for GRPOTrainer and its like."
        )
    if trainer.ref_model is not None:
        raise UserError(
            f"{name} has loaded a second model as its reference; make it with beta=0.0 in its "
            f"configuration, and give beta to use_base_as_reference."
        )
    if not beta > 0:
        raise UserError(f"beta={beta!r}; the weight of the divergence is above 0.")
    trainer.ref_model = BaseReference(trainer.model)
    trainer.beta = trainer.args.beta = beta


def allow_quantized(model: Model) -> Model:
    """Let a Trainer take an adapted model whose base is quantized.

    transformers' Trainer refuses a quantized model unless PEFT has put adapters on it, before it
    calls any callback. An allocator or an `AdapterCallback` takes the permission back.

    Args:
        model: a transformers model that holds wrappers.
    Returns:
        The same model.
    Raises:
        UserError: if it has no adapter, because a quantized weight cannot train.
    """
    if not wrapped_layers(model):
        raise UserError(
            f"This {type(model).__name__} holds no adapter, and quantized weights cannot train; "
            f"call adaptrank.adapt(model, ...) first."
        )
    setattr(model, COUNTS_AS_ADAPTED, True)
    return model


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and restore the mode of each module afterwards."""
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        yield
    finally:
        for module in in_training:
            module.training = True
