"""Models of three sizes with random weights, and the variants of them that are compared."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import common
import torch
import training_step
from torch import Tensor, nn

from adaptrank import PARAMETERIZATIONS, adapt
from gpu_parts.settings import PEFT, Size

Step = Callable[[], float]


@contextmanager
def made_as(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make tensors on this device and in this dtype unless their maker says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def frozen(size: Size, device: torch.device, vocabulary: int = 0) -> Any:
    """Return a frozen Llama in bf16 with random weights, and a head if there is a vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    made = LlamaForCausalLM if vocabulary else LlamaModel
    config = LlamaConfig(**size.shapes, vocab_size=vocabulary or 64, tie_word_embeddings=True)
    torch.manual_seed(0)
    with made_as(device, torch.bfloat16):
        model = made(config)
    return model.requires_grad_(False)


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of a model with modules of its own and the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Graphs:
    """Number of graphs that torch.compile makes from here on. It forgets those it made before."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.before = 0
        self.before = self.made()

    def made(self) -> int:
        """Return the number of graphs so far."""
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"]) - self.before


def adapted(method: str, base: nn.Module) -> nn.Module:
    """Return a model adapted by one of our methods, or by a nest that is written with +."""
    nest = [training_step.ours(PARAMETERIZATIONS[name]) for name in method.split(" + ")]
    return adapt(sharing(base), common.LINEAR, nest)


def adapted_by_peft(method: str, base: nn.Module) -> nn.Module:
    """Return a model adapted by HF PEFT's counterpart of one of our methods."""
    import peft

    return peft.get_peft_model(sharing(base), training_step.theirs(method, common.LINEAR))


def variant(name: str, base: nn.Module) -> nn.Module:
    """Return "floor" (the frozen model), one of METHODS, or "PEFT " and a name of IN_PEFT.

    Trained tensors get noise, so that no product is one with zeros.
    """
    torch.manual_seed(0)
    if name == "floor":
        model = sharing(base)
    elif name.startswith(PEFT):
        model = adapted_by_peft(name.removeprefix(PEFT), base)
    else:
        model = adapted(name, base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


class Workload:
    """An input of random hidden states, and a loss of random weights on what a model returns."""

    def __init__(self, size: Size, device: torch.device) -> None:
        shape = (size.rows, size.tokens, size.shapes["hidden_size"])
        torch.manual_seed(0)
        self.x = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()
        self.weights = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def loss(self, model: nn.Module) -> Tensor:
        self.x.grad = None
        output = model(inputs_embeds=self.x).last_hidden_state
        return (output * self.weights).sum() / len(self.weights)

    def step(self, model: nn.Module) -> Step:
        """Return a training step, or for a frozen model a forward and a backward pass."""
        return training_step.step(model, self.loss)
