"""Settings that gpu.py measures, on a GPU and in a trial on a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import training_step

METHODS = (
    "LoRA",
    "HyperAdapt",
    "SVD",
    "DoRA",
    "MiSS",
    "LoKr",
    "SBoRA",
    "HyperAdapt + LoRA",
    "NOLA",
    "TensorTrain",
    "Kronecker",
)
"""The methods by importance. Where time is short, the last ones are left out."""
IN_PEFT = tuple(training_step.ASKED)
"""Methods that HF PEFT has, SVD as AdaLoRA."""
PEFT = "PEFT "
COMPILED = ("floor", "LoRA", "PEFT LoRA", "HyperAdapt", "SVD", "MiSS", "DoRA", "SBoRA", "NOLA")
OTHERS_COMPILED = ("HyperAdapt + LoRA", "LoKr", "TensorTrain", "Kronecker")
CHECKPOINTED = ("floor", "LoRA", "PEFT LoRA", "HyperAdapt", "SVD", "DoRA", "MiSS")


@dataclass(frozen=True)
class Size:
    """Shapes of a Llama, and of its input: rows of tokens."""

    name: str
    shapes: dict[str, Any]
    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} x {self.tokens} tokens"


def llama(width: int, inside: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    """Return the shapes of a Llama as its configuration names them."""
    return {
        "hidden_size": width,
        "intermediate_size": inside,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "use_cache": False,
    }


SIZES = {
    "135M": Size("135M", llama(576, 1536, 30, 9, 3), 8, 128),
    "1B": Size("1B", llama(2048, 8192, 16, 32, 8), 8, 512),
    "8B": Size("8B", llama(4096, 14336, 32, 32, 8), 4, 512),
}
TINY_SIZES = {name: Size(name, llama(64, 128, 1, 2, 2), 2, 8) for name in SIZES}


def with_counterparts(methods: Sequence[str]) -> list[str]:
    """Return the floor and methods, each one followed by its counterpart in HF PEFT."""
    names = ["floor"]
    for method in methods:
        names += [method, PEFT + method] if method in IN_PEFT else [method]
    return names


@dataclass(frozen=True)
class Settings:
    """Choice of the measurements.

    Args:
        sizes: sizes by their names.
        variants: what is measured in eager mode at 1B.
        variants_of_others: what is measured in eager mode at the other sizes.
        compiled: what is measured with compiled blocks.
        checkpointed: what is measured with gradient checkpointing.
        options: options of torch.compile.
        rounds: most interleaved rounds.
        times: steps of a variant in a round.
        ranks: rank at the start and mean rank at the end, where ranks fall.
        events: events in which they fall.
        vocabulary: tokens of the model of the whole run.
        batches: batches of the whole run.
        batch: rows of a batch of the whole run.
        runs: most rounds of the whole run.
    """

    sizes: dict[str, Size] = field(default_factory=lambda: SIZES)
    variants: Sequence[str] = field(default_factory=lambda: with_counterparts(METHODS))
    variants_of_others: Sequence[str] = field(default_factory=lambda: with_counterparts(METHODS))
    compiled: Sequence[str] = COMPILED + OTHERS_COMPILED
    checkpointed: Sequence[str] = CHECKPOINTED
    options: dict[str, Any] = field(default_factory=dict)
    rounds: int = 5
    times: int = 2
    ranks: tuple[int, int] = (64, 8)
    events: int = 3
    vocabulary: int = 49152
    batches: int = 24
    batch: int = 8
    runs: int = 2


FULL = Settings()
TINY = Settings(
    sizes=TINY_SIZES,
    variants_of_others=("floor", "LoRA", "PEFT LoRA"),
    compiled=("floor",),
    checkpointed=("floor", "LoRA"),
    options={"backend": "eager"},
    rounds=1,
    times=1,
    ranks=(8, 2),
    events=1,
    vocabulary=64,
    batches=3,
    batch=2,
    runs=1,
)
"""Tiny shapes, for the tests. Compiling takes longest there, and few variants stand for all."""
