"""Dispatched operations of an adapted layer: what a GPU would launch, counted on the CPU.

An operation that runs no kernel, such as a view, does not count. A custom operation counts by the
operations inside of it. The counts are those of a tiny Llama in bf16, forward and backward, above
the frozen model and per adapted layer.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import adaptrank

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCKS = 2
RUNS_NO_KERNEL = {
    "aten._unsafe_view",
    "aten.detach",
    "aten.is_same_size",
    "aten.lift_fresh",
    "aten.sym_numel",
    "aten.sym_size",
    "aten.sym_stride",
}

MOST = {
    "ALoRE": 20.0,
    "DoRA": 30.0,
    "HyperAdapt": 8.5,
    "Kronecker": 13.0,
    "LoKr": 16.0,
    "LoRA": 8.5,
    "MELoRA": 17.0,
    "MiSS": 5.5,
    "MultiScale": 17.0,
    "NEAT": 17.0,
    "NOLA": 45.0,
    "PiCa": 7.0,
    "ResidualOffset": 3.0,
    "SBoRA": 5.5,
    "SVD": 12.5,
    "TensorTrain": 18.0,
    "TensorTrainAdapter": 40.0,
}
"""Method -> operations per layer at which a change of the code has to explain itself."""

PEFT: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=LINEAR),
    "LoKr": lambda: peft.LoKrConfig(r=8, alpha=16, target_modules=LINEAR),
    "LoRA": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR),
    "MiSS": lambda: peft.MissConfig(r=8, target_modules=LINEAR),
    "SVD": lambda: peft.AdaLoraConfig(
        init_r=8, target_r=8, lora_alpha=16, total_step=10**6, target_modules=LINEAR
    ),
}
"""Method -> its configuration in HF PEFT."""


class Operations(TorchDispatchMode):
    """Counts the operations that run a kernel."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function._overloadpacket)
        assert name.startswith(("aten.", "prim")), f"{name} hides the kernels inside of it"
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and name not in RUNS_NO_KERNEL:
            self.count += 1
        return function(*args, **(kwargs or {}))


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def operations(model: nn.Module) -> int:
    """Return the operations of the forward and the backward pass of a step with fresh gradients."""
    tokens = torch.arange(32).view(2, 16)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)
    with Operations() as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counter.count


@pytest.fixture(scope="module")
def floor() -> int:
    """Operations of the frozen model, with a gradient for the inputs of its blocks."""
    model = llama()
    model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_(True))
    return operations(model)


def per_layer(model: nn.Module, floor: int) -> float:
    return (operations(model) - floor) / (BLOCKS * len(LINEAR))


def ours(method: str, floor: int) -> float:
    make = adaptrank.PARAMETERIZATIONS[method]
    return per_layer(adaptrank.adapt(llama(), targets=LINEAR, parameterization=make), floor)


@pytest.mark.parametrize("method", sorted(MOST))
def test_a_layer_launches_few_operations(method: str, floor: int) -> None:
    assert ours(method, floor) <= MOST[method]


@pytest.mark.parametrize("method", sorted(PEFT))
def test_a_layer_launches_fewer_operations_than_that_of_peft(method: str, floor: int) -> None:
    theirs = per_layer(peft.get_peft_model(llama(), PEFT[method]()), floor)
    assert ours(method, floor) < theirs


def test_hyperadapt_launches_no_more_operations_than_lora(floor: int) -> None:
    assert ours("HyperAdapt", floor) <= ours("LoRA", floor)


def test_every_method_of_linear_layers_has_a_row() -> None:
    missing = []
    for name, method in adaptrank.PARAMETERIZATIONS.items():
        if method.__module__.startswith("adaptrank.") and method.wraps(nn.Linear(2, 2)):
            missing.append(name)
    assert set(missing) == MOST.keys()
