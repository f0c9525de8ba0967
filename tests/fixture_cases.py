"""Tiny models and runs behind the recorded files in `tests/data`.

Every number comes from Python's own generator, so that models, inputs and batches are the same on
every machine and with every version of PyTorch. All models are in float64.
"""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import adapt, fit_ranks, rank_axes
from adaptrank.allocation import (
    EVA,
    AdaLoRA,
    Allocator,
    ALoRA,
    BeamLoRA,
    DyLoRA,
    ElaLoRA,
    GeLoRA,
    GoRA,
    LoRAPrune,
    PRILoRA,
    SoRA,
    SubLoRA,
)
from adaptrank.parameterizations import PARAMETERIZATIONS, HyperAdapt, LoRA, wrappers

TOTAL = 12
"""Optimizer steps of a recorded run."""
STOP = 5
"""Optimizer steps after which the checkpoint of a run was taken, between two events."""
PHASES = {"every": 2, "warmup": 2, "final": 2}
WIDTH = 8


def numbers(seed: int | str, *shape: int) -> Tensor:
    """Return standard normal numbers in float64."""
    generator = random.Random(seed)
    values = [generator.gauss(0.0, 1.0) for _ in range(math.prod(shape))]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def fill(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Convert to float64 and set every parameter to numbers drawn from its name."""
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(std * numbers(name, *parameter.shape))
    return model


def perturb(model: nn.Module, std: float = 0.1) -> None:
    """Move every trainable tensor away from its initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(std * numbers(f"noise of {name}", *parameter.shape))


# ---- adapters


def two_layers() -> nn.Module:
    """Return two square linear layers with a nonlinearity between them."""
    return fill(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)))


def wraps_linear_layers(case: str) -> bool:
    """Return whether the adapters of a case wrap linear layers."""
    return case not in PARAMETERIZATIONS or PARAMETERIZATIONS[case].wraps(nn.Linear(16, 16))


ARGUMENTS: dict[str, dict[str, Any]] = {
    "ALoRE": {"rank": 2},
    "AttentionScale": {"form": "full", "tokens": 4},
    "DoRA": {"rank": 3},
    "Kronecker": {"rank": 2},
    "LoKr": {"rank": 2},
    "LoRA": {"rank": 3},
    "MELoRA": {"minis": 4},
    "MiSS": {"rank": 4},
    "MultiScale": {"rank": 3, "width": 2},
    "NEAT": {"rank": 3, "depth": 1},
    "NOLA": {"rank": 3, "k_a": 4, "k_b": 4},
    "PiCa": {"rank": 3},
    "Prefix": {"tokens": 3},
    "SBoRA": {"rank": 3},
    "SVD": {"rank": 3},
    "TensorTrain": {"rank": 4, "tt_rank": 2},
    "TensorTrainAdapter": {"bottleneck": 16, "tt_rank": 2},
}
"""Small arguments of the methods. A method without an entry has its default arguments."""


def method_of(name: str) -> Callable[[nn.Module], nn.Module]:
    """Return a method with its small arguments."""
    return partial(PARAMETERIZATIONS[name], **ARGUMENTS.get(name, {}))


def base_of(case: str) -> nn.Module:
    """Return the model of an adapter case, before it is adapted."""
    if wraps_linear_layers(case):
        return two_layers()
    return fill(nn.Sequential(PARAMETERIZATIONS[case].example()))


def adapted_of(case: str) -> nn.Module:
    """Return the model of an adapter case with perturbed adapters."""
    model = base_of(case)
    if case == "HyperAdapt+LoRA":
        adapt(model, "all-linear", [HyperAdapt, partial(LoRA, rank=2)])
    elif case == "second_name":
        adapt(model, "all-linear", partial(LoRA, rank=2))
        adapt(model, ["2"], method_of("DoRA"), name="second")
    elif case == "rank_pattern":
        adapt(model, "all-linear", partial(LoRA, rank=3), rank_pattern={"0": 1, "2": 5})
    else:
        adapt(model, "all-linear" if wraps_linear_layers(case) else "all", method_of(case))
    perturb(model)
    return model


SHIPPED = [n for n, c in PARAMETERIZATIONS.items() if c.__module__.startswith("adaptrank.")]
ADAPTER_CASES = [*SHIPPED, "HyperAdapt+LoRA", "second_name", "rank_pattern"]
"""Every method of the registry, a nest, two adapters with different names, and different ranks."""


def input_of(case: str) -> Tensor:
    """Return the fixed input of an adapter case."""
    if case == "Prefix":
        generator = random.Random(case)
        return torch.tensor([[generator.randrange(32) for _ in range(4)] for _ in range(3)])
    if case == "AttentionScale":
        return numbers(case, 2, 4, 24)
    width = 48 if case == "LNTune" else 16
    return numbers(case, 5, width)


def first_tensor(output: Any) -> Tensor:
    """Return the output, or the first tensor of an output with several."""
    while not isinstance(output, Tensor):
        output = output["last_hidden_state"] if isinstance(output, dict) else output[0]
    return output


# ---- allocators


class Chain(nn.Module):
    """Three numbered blocks of one linear layer each."""

    def __init__(self, rank: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        fill(self)
        self.prepare()
        adapt(self.layers, "all-linear", partial(LoRA, rank=rank))
        perturb(self)
        # These tensors are where the adapters start. A rank initializer refuses trained ones.
        for wrapper in wrappers(self):
            wrapper.starts_at_base = False

    def prepare(self) -> None:
        """Change the base weights before they are adapted."""

    def loss(self, x: Tensor) -> Tensor:
        """Return the mean squared distance to the rotated input."""
        hidden = x
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden)) + 0.5 * hidden
        return (hidden - x.roll(1, dims=-1)).square().mean()

    def batch(self, index: int) -> Tensor:
        """Return the inputs of a batch."""
        return numbers(f"batch {index}", 16, WIDTH)


class Widening(Chain):
    """Blocks whose outputs show 1, 4, 2 and 2 dimensions. The others are too small to be seen."""

    gains = (1, 4, 2, 2)

    def prepare(self) -> None:
        visible = [(torch.arange(WIDTH) < count).double() for count in self.gains]
        scales = [shown + 1e-5 * (1 - shown) for shown in visible]
        with torch.no_grad():
            for layer, read, given in zip(self.layers, scales[:-1], scales[1:], strict=True):
                layer[0].weight.copy_(torch.diag(given / read))
                layer[0].bias.zero_()
        self.start = scales[0]

    def loss(self, x: Tensor) -> Tensor:
        hidden = x * self.start
        for layer in self.layers:
            hidden = layer(hidden)
        return (hidden - 1).square().mean()


class TinyLlama(nn.Module):
    """A Llama of three layers, whose heads and channels can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=6,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
        self.backbone = LlamaForCausalLM(config)
        fill(self)
        adapt(self.backbone, "all-linear", partial(LoRA, rank=1))
        perturb(self)

    def loss(self, ids: Tensor) -> Tensor:
        """Return the language modelling loss."""
        return self.backbone(input_ids=ids, labels=ids).loss

    def batch(self, index: int) -> Tensor:
        """Return the tokens of a batch."""
        generator = random.Random(f"batch {index}")
        return torch.tensor([[generator.randrange(16) for _ in range(6)] for _ in range(4)])


Case = tuple[type[Any], Callable[[], list[Allocator]]]

ALLOCATOR_CASES: dict[str, Case] = {
    "adalora_soft": (Chain, lambda: [AdaLoRA(budget=6, **PHASES)]),
    "adalora_hard": (Chain, lambda: [AdaLoRA(budget=6, soft=False, **PHASES)]),
    "elalora": (Chain, lambda: [ElaLoRA(swaps=3, **PHASES)]),
    "alora": (Chain, lambda: [ALoRA(units=2, batches=2, **PHASES)]),
    "sublora": (Chain, lambda: [SubLoRA(budget=6, batches=2, **PHASES)]),
    "sora": (Chain, lambda: [SoRA(budget=7, floor=1, **PHASES)]),
    "beamlora": (Chain, lambda: [BeamLoRA(p0=0.6, **PHASES)]),
    "dylora": (Chain, lambda: [DyLoRA(seed=3, rule="drawn")]),
    "dylora_published": (Chain, lambda: [DyLoRA(seed=3)]),
    "loraprune": (TinyLlama, lambda: [LoRAPrune(sparsity=0.5, whole=0.34, **PHASES)]),
    "eva": (Chain, lambda: [EVA(max_batches=4)]),
    "gora": (Chain, lambda: [GoRA(batches=4, temperature=0.1)]),
    "gelora": (Widening, lambda: [GeLoRA(samples=96)]),
    "prilora": (Chain, lambda: [PRILoRA(first=2, last=6, every=3, final=2)]),
    "eva_and_adalora": (Chain, lambda: [EVA(max_batches=4), AdaLoRA(budget=6, floor=1, **PHASES)]),
}
"""Name -> (model, allocators of the run, rank initializer first)."""


class Run:
    """A training loop with the three calls of each allocator."""

    def __init__(self, case: str) -> None:
        model, allocators = ALLOCATOR_CASES[case]
        self.model = model()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=2e-2)
        self.allocators = allocators()
        self.steps_done = 0

    def batches(self) -> Iterator[Tensor]:
        """Yield the training batches from their beginning."""
        for index in range(TOTAL):
            yield self.model.batch(index)

    def start(self) -> None:
        """Start every allocator, or let it go on from the state it has loaded."""
        batches = [*self.batches()]
        for allocator in self.allocators:
            allocator.start(
                self.model, self.optimizer, TOTAL, batches=batches, loss=self.model.loss
            )

    def train(self, until: int) -> None:
        """Take optimizer steps until so many are done."""
        while self.steps_done < until:
            self.model.loss(self.model.batch(self.steps_done)).backward()
            for allocator in self.allocators:
                allocator.before_step()
            self.optimizer.step()
            for allocator in self.allocators:
                allocator.step()
            self.optimizer.zero_grad()
            self.steps_done += 1

    def finish(self) -> None:
        """End the run of every allocator."""
        for allocator in self.allocators:
            allocator.finish()

    def checkpoint(self) -> dict[str, Any]:
        """Return everything that a run needs to go on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "allocators": [allocator.state_dict() for allocator in self.allocators],
        }

    def restore(self, checkpoint: dict[str, Any], steps_done: int) -> None:
        """Load a checkpoint into a run that was only constructed."""
        fit_ranks(self.model, checkpoint["model"])
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for allocator, state in zip(self.allocators, checkpoint["allocators"], strict=True):
            allocator.load_state_dict(state)
        self.steps_done = steps_done

    def outcome(self) -> dict[str, Any]:
        """Return what is compared at the end of a run."""
        return {
            "events": [allocator.events for allocator in self.allocators],
            "sizes": sizes(self.model),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
        }


def sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of units of every rank axis."""
    return {key: len(axis) for key, axis in rank_axes(model).items()}


# ---- Lightning


class Module(lightning.LightningModule):
    """The chain as a LightningModule. A batch is told by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(TOTAL), batch_size=1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.chain.loss(self.chain.batch(batch_idx))

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=2e-2)


LIGHTNING_CASES: dict[str, Callable[[], Allocator]] = {
    "lightning_adalora": lambda: AdaLoRA(budget=6, **PHASES),
    "lightning_elalora": lambda: ElaLoRA(swaps=3, **PHASES),
}


class SaveOnce(lightning.Callback):
    """Save a checkpoint after step `STOP`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == STOP:
            trainer.save_checkpoint(self.path)


def fit(
    module: Module, callbacks: list[Any], checkpoint: str | None = None, root: str | None = None
) -> lightning.Trainer:
    """Train with Lightning to the last step, from a checkpoint where one is given."""
    trainer = lightning.Trainer(
        max_steps=TOTAL,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    resume = {} if checkpoint is None else {"ckpt_path": checkpoint, "weights_only": True}
    trainer.fit(module, **resume)
    return trainer


def lightning_outcome(
    module: Module, allocator: Allocator, trainer: lightning.Trainer
) -> dict[str, Any]:
    """Return what is compared at the end of a Lightning run."""
    return {
        "events": [allocator.events],
        "sizes": sizes(module),
        "model": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
    }
