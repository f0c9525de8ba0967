"""Number of operations that an adapted layer launches, counted without a GPU.

    python benchmarks/operation_counts.py

- Model: a tiny Llama of two blocks in bf16, with an adapter on all linear layers, at the defaults
  of each method. HF PEFT's adapters stand beside ours where it has the method. It is on the meta
  device, where methods take the path of a GPU. The inputs of all layers need a gradient.
- Operations: those that PyTorch dispatches in a forward and a backward pass, less those of the
  frozen model, divided by the number of adapted layers. An operation that runs no kernel, such as
  a view, does not count. A custom operation would count by the operations inside of it.

The counts depend on no machine. The script writes benchmarks/results/operation_counts.json and
docs/results/operation_counts.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

import common
import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import PARAMETERIZATIONS, adapt

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
NESTS = (("HyperAdapt", "LoRA"), ("HyperAdapt", "SVD"), ("LoRA", "DoRA"))

PEFT: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(
        r=8, lora_alpha=16, use_dora=True, target_modules=common.LINEAR
    ),
    "LoKr": lambda: peft.LoKrConfig(r=8, alpha=16, target_modules=common.LINEAR),
    "LoRA": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=common.LINEAR),
    "MiSS": lambda: peft.MissConfig(r=8, target_modules=common.LINEAR),
    "SVD": lambda: peft.AdaLoraConfig(
        init_r=8, target_r=8, lora_alpha=16, total_step=10**6, target_modules=common.LINEAR
    ),
}
"""Method -> its configuration in HF PEFT."""


class Operations(TorchDispatchMode):
    """Counts the operations that run a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.custom: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function._overloadpacket)
        if not name.startswith(("aten.", "prim")):
            self.custom.add(name)
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and name not in RUNS_NO_KERNEL:
            self.count += 1
        return function(*args, **(kwargs or {}))


def llama() -> Any:
    """Return a frozen Llama of two blocks in bf16, whose embedding passes a gradient on."""
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
    model = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_(True))
    return model


def operations(model: nn.Module) -> int:
    """Return the operations of the forward and the backward pass of a step with fresh gradients.

    Raises:
        RuntimeError: if a custom operation hides the kernels inside of it.
    """
    tokens = torch.arange(32, device="meta").view(2, 16)
    # Transformers would read the values of a mask of two dimensions.
    mask = torch.zeros(2, 1, 16, 16, device="meta", dtype=torch.bfloat16)
    model.to("meta").train()

    def step() -> None:
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    with Operations() as counter:
        step()
    if counter.custom:
        raise RuntimeError(f"{sorted(counter.custom)} hide the kernels inside of them.")
    return counter.count


def floor() -> int:
    """Return the operations of the frozen model."""
    return operations(llama())


def per_layer(model: nn.Module, floor: int) -> float:
    """Return the operations of an adapted layer above those of the frozen one."""
    return (operations(model) - floor) / (BLOCKS * len(common.LINEAR))


def ours(methods: Sequence[str], floor: int) -> float:
    """Return the operations of a layer with these methods, the innermost first."""
    makers = [PARAMETERIZATIONS[method] for method in methods]
    return per_layer(adapt(llama(), targets=common.LINEAR, parameterization=makers), floor)


def theirs(method: str, floor: int) -> float:
    """Return the operations of a layer with HF PEFT's adapter of this method."""
    return per_layer(peft.get_peft_model(llama(), PEFT[method]()), floor)


def methods_of_linear_layers() -> list[str]:
    """Return the names of the methods of this library that wrap a linear layer."""
    return [
        name
        for name, method in PARAMETERIZATIONS.items()
        if method.__module__.startswith("adaptrank.") and method.wraps(nn.Linear(2, 2))
    ]


def page(found: dict[str, Any]) -> str:
    """Return the Markdown page of the counts."""
    rows = []
    for name, counts in found["methods"].items():
        row = [name, f"{counts['ours']:.1f}"]
        row.append("" if counts["peft"] is None else f"{counts['peft']:.1f}")
        rows.append(row)
    return "\n".join(
        [
            "# Operations per adapted layer",
            "",
            common.paragraph(
                "Operations that PyTorch dispatches in the forward and the backward pass of an",
                "adapted linear layer, above those of the frozen layer. In eager mode a GPU",
                "launches about one kernel for each. Counted on a tiny Llama of two blocks in bf16",
                "on the meta device, where methods take the path of a GPU, with adapters in",
                "float32 on all linear layers, at the defaults of each method. Views do not count.",
                "Methods of a nest are named from the inside out.",
            ),
            "",
            common.table(["method", "adaptrank", "HF PEFT"], rows),
            "",
            common.paragraph(
                f"PyTorch {found['torch']}, HF PEFT {found['peft']}. Counts are the same on every",
                "machine with these versions. Command: `python benchmarks/operation_counts.py`.",
                "`tests/test_operation_counts.py` holds that ours are below those of HF PEFT.",
            ),
            "",
        ]
    )


def main() -> None:
    """Count, print and write."""
    frozen = floor()
    found: dict[str, Any] = {"torch": torch.__version__, "peft": peft.__version__, "methods": {}}
    for method in methods_of_linear_layers():
        beside = theirs(method, frozen) if method in PEFT else None
        found["methods"][method] = {"ours": ours([method], frozen), "peft": beside}
    for nest in NESTS:
        found["methods"][" + ".join(nest)] = {"ours": ours(nest, frozen), "peft": None}
    common.write("operation_counts", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
