"""Processes of test_distributed.py: run scenarios on their part of a batch, and save results.

    python distributed_runs.py

A line of JSON on the standard input asks for processes: a list of {"environment": variables,
"arguments": [FOLDER, SCENARIO, ...], "output": file}. They are forked, so that the packages are
imported once for all of them. A line of JSON with the [process number, exit code] of each answers.

With WORLD_SIZE=1 a process takes the whole batch. The other runs are compared with this one.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_allocators import SVD4, Toy, everything, fit
from test_step_mean import LENGTHS, TinyCausal, rows, train
from torch import nn
from torch.distributed.tensor import DTensor

from adaptrank.allocation import (
    EVA,
    AdaLoRA,
    ALoRA,
    BeamLoRA,
    DyLoRA,
    ElaLoRA,
    PRILoRA,
    SoRA,
    SubLoRA,
)
from adaptrank.allocation.plans import Resize
from adaptrank.axes import rank_axes
from adaptrank.optimizers import LoRARITE
from adaptrank.parameterizations import HyperAdapt, LoRA
from adaptrank.parameterizations.decoupled_lora import DecoupledLoRA
from adaptrank.strategies import RACLoRA, ReLoRA, SDLoRA, XGBLoRA
from adaptrank.training.distributed import shard_frozen
from adaptrank.training.finite import FiniteWeights, NotFiniteError

RANK, WORLD = 0, 1
"""Place of this process, which `begin` sets."""

LONGEST = 240
"""Seconds until processes that have not ended are killed."""

STEPS, SAVED = 12, 6
"""Optimizer steps of a run, and the step after which the resumed run goes on."""

PHASES = {"every": 2, "warmup": 3, "final": 3}
"""Phases of an allocator that acts after steps 5, 7 and 9."""


class Shared(Toy):
    """Model whose processes take their rows of the batch.

    Each starts somewhere else unless the start of the first one is handed on.
    """

    def __init__(self, method=SVD4, head=False, **arguments):
        super().__init__(method, torch.float64, **arguments)
        self.head = nn.Linear(12, 1, dtype=torch.float64) if head else None
        if RANK:
            for p in self.parameters():
                p.data += p.requires_grad

    def loss(self, index):
        random = torch.Generator().manual_seed(index)
        x = torch.randn(8, 16, generator=random, dtype=torch.float64)[RANK::WORLD]
        y = [layer(x) for layer in self.maps]
        total = sum(
            ((i + 1) * one - x[:, torch.arange(one.shape[1]) % 16]).square().mean()
            for i, one in enumerate(y)
        )
        return total if self.head is None else total + (self.head(sum(y)) - 1).square().mean()

    def configure_model(self):
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not getattr(self, "_sharded", False):
            self._sharded = True
            shard_frozen(self, list(self.maps), strategy.device_mesh["data_parallel"])


class Rite(Shared):
    """LoRA-RITE, whose state lies in bases that each process computes for itself."""

    def __init__(self):
        super().__init__(partial(LoRA, rank=4))

    def configure_optimizers(self):
        return LoRARITE(self, lr=1e-2)


class Activations(AdaLoRA):
    """Importance by what each process sees of the inputs, which nobody averages by itself."""

    importance = "magnitude"

    def install(self, state, axes):
        self.local = {}
        for key, axis in axes.items():
            layer = axis.members[0][0]
            self.run.handles.append(layer.register_forward_pre_hook(partial(self.see, key)))

    def see(self, key, layer, inputs):
        if layer.training:
            value = (inputs[0].detach() @ layer.Q.detach().T * layer.l.detach()).square().mean(0)
            self.local[key] = self.local.get(key, 0) + value

    def update(self, state, axes):
        for key, value in self.local.items():
            seen = state.track(axes[key], "seen", torch.zeros_like(value))
            seen.add_(self.run.reduce(value))
        self.local = {}

    def score_units(self, state, axes):
        zeros = {key: torch.zeros(len(axis), dtype=torch.float64) for key, axis in axes.items()}
        return {key: state.track(axis, "seen", zeros[key]) for key, axis in axes.items()}


class Variance(AdaLoRA):
    """Importance by a score of the library that looks at activations."""

    importance = "explained_variance"


def adalora():
    return AdaLoRA(budget=6, **PHASES)


def hard_adalora():
    return AdaLoRA(budget=6, soft=False, **PHASES)


def partly_empty():
    """Return a model whose last layer starts without units."""
    model = Shared([HyperAdapt, partial(LoRA, rank=4)])
    *_, last = rank_axes(model).values()
    last.resize([])
    return model


class Emptied(AdaLoRA):
    """Layers lose all of their units and get some again. The last layer had none."""

    importance, exact, requires = "magnitude", False, frozenset({"grow"})

    def plan(self, scores, cost, budget, step):
        first, second, third = scores
        return {
            5: {first: Resize(())},
            7: {first: Resize((), 2), second: Resize(())},
            9: {second: Resize((), 1), third: Resize((), 1)},
        }[step]


SCENARIOS = {
    "adalora": (Shared, adalora, {}),
    "hard": (Shared, hard_adalora, {"accumulate_grad_batches": 2}),
    "elalora": (partial(Shared, LoRA), lambda: ElaLoRA(**PHASES), {"accumulate_grad_batches": 2}),
    "hybrid": (partial(Shared, [HyperAdapt, partial(LoRA, rank=4)]), hard_adalora, {}),
    "emptied": (
        partly_empty,
        lambda: Emptied(budget=4, soft=False, floor=0, **PHASES),
        {},
    ),
    "head": (partial(Shared, head=True), lambda: ElaLoRA(**PHASES), {}),
    "rite": (Rite, lambda: ElaLoRA(**PHASES), {}),
    "inputs": (
        partial(Shared, LoRA),
        lambda: PRILoRA(2, 6, every=3, final=3),
        {"accumulate_grad_batches": 2},
    ),
    "sora": (
        partial(Shared, partial(LoRA, rank=4)),
        lambda: SoRA(6, l1=1.0, **PHASES),
        {"accumulate_grad_batches": 2},
    ),
    "beamlora": (
        partial(Shared, partial(LoRA, rank=4)),
        lambda: BeamLoRA(p0=0.5, until=1.0, **PHASES),
        {"accumulate_grad_batches": 2},
    ),
    "dylora": (
        partial(Shared, partial(LoRA, rank=4)),
        lambda: DyLoRA(truncate=2),
        {"accumulate_grad_batches": 2},
    ),
    "ablation": (partial(Shared, partial(LoRA, rank=4)), lambda: ALoRA(**PHASES), {}),
    "hessian": (Shared, lambda: SubLoRA(6, **PHASES), {"accumulate_grad_batches": 2}),
    "variance": (
        partial(Shared, partial(LoRA, rank=4)),
        lambda: Variance(budget=6, soft=False, **PHASES),
        {},
    ),
    "directions": (partial(Shared, partial(LoRA, rank=4)), lambda: EVA(rho=4, max_batches=1), {}),
    "relora": (
        partial(Shared, partial(LoRA, rank=2)),
        lambda: ReLoRA(every=4, restart_warmup=2),
        {"accumulate_grad_batches": 2},
    ),
    "rac_lora": (partial(Shared, partial(LoRA, rank=2)), lambda: RACLoRA(every=4), {}),
    "xgblora": (
        partial(Shared, partial(LoRA, rank=2)),
        lambda: XGBLoRA(every=4, blocks=2, shrinkage=0.5),
        {},
    ),
    "sd_lora": (
        partial(Shared, partial(DecoupledLoRA, rank=2)),
        lambda: SDLoRA(steps_per_task=[4, 4, 4]),
        {"accumulate_grad_batches": 2},
    ),
    "activations": (Shared, lambda: Activations(budget=6, soft=False, **PHASES), {}),
}


def settings():
    if WORLD == 1:
        return {}
    return {"strategy": strategy(), "devices": WORLD, "use_distributed_sampler": False}


def strategy():
    if os.environ.get("SHARDED"):
        return ModelParallelStrategy(
            data_parallel_size=WORLD, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy(process_group_backend="gloo")


def left(folder, name, model, trainer, callback):
    """Save all tensors and the events of an allocator or of a training strategy."""
    tensors = {key: value.detach().clone() for key, value in everything(model, trainer).items()}
    tensors = {
        key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in tensors.items()
    }
    events = getattr(callback, "round_events", None) or callback.events
    torch.save((tensors, events), folder / f"{name}.{WORLD}.{RANK}.pt")


def run(folder, name):
    make, allocate, arguments = SCENARIOS[name]
    model, allocator = make(), allocate()
    checkpoint = ModelCheckpoint(
        folder / f"{name}.{WORLD}", "{step}", every_n_train_steps=SAVED, save_top_k=-1
    )
    trainer = fit(model, allocator, checkpoint, steps=STEPS, **arguments, **settings())
    if os.environ.get("SHARDED") and WORLD > 1:
        frozen = [layer.innermost.weight for layer in model.maps]
        assert all(
            isinstance(weight, DTensor) and 2 * weight.to_local().numel() == weight.numel()
            for weight in frozen
        )
    left(folder, name, model, trainer, allocator)
    if WORLD == 1:
        # That one process resumes exactly is tested without launchers.
        return
    model, allocator = make(), allocate()
    path = folder / f"{name}.{WORLD}" / f"step={SAVED}.ckpt"
    arguments = {**arguments, **settings(), "steps": STEPS}
    trainer = fit(model, allocator, ckpt_path=path, **arguments)
    left(folder, f"{name} resumed", model, trainer, allocator)


def tokens(folder):
    """Rows of unequal length: each process takes its rows of every batch, one of them no label."""
    batches = []
    for seed, lengths in enumerate(LENGTHS[:4]):
        lengths = (*lengths, 8) if len(lengths) % 2 else lengths
        batch = rows(lengths, seed)
        batch["labels"][1::WORLD_OF_ROWS] = -100 if seed == 1 else batch["labels"][1::WORLD_OF_ROWS]
        batches.append({key: value[RANK::WORLD] for key, value in batch.items()})
    state, watch, _ = train(TinyCausal, batches, accumulate_grad_batches=3, **settings())
    torch.save((state, watch.losses), folder / f"tokens.{WORLD}.{RANK}.pt")


WORLD_OF_ROWS = 2
"""Every second row belongs to the second process, if there is one."""


class Dies(Callback):
    """The second process is killed in the middle."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if int(os.environ["DIES"]) == RANK and batch_idx == 6:
            os.kill(os.getpid(), signal.SIGKILL)


class OneIsNaN(Callback):
    """The gradients of the second process become NaN, after they were averaged."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if RANK == 1 and trainer.global_step == 5:
            for p in pl_module.parameters():
                if p.grad is not None:
                    p.grad.fill_(torch.nan)


def stops():
    """Both processes stop with one sentence."""
    callbacks = (adalora(), OneIsNaN(), FiniteWeights())
    try:
        fit(Shared(), *callbacks, steps=STEPS, log_every_n_steps=6, **settings())
    except NotFiniteError as error:
        print(f"stopped: {error}", flush=True)


def begin(environment, output):
    """Become a process of a run: take its variables, and write what it says to a file."""
    global RANK, WORLD
    os.environ.update(environment)
    RANK, WORLD = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)


def run_all(folder, *names):
    for name in names:
        if name == "stops":
            stops()
        elif name == "dies":
            fit(Shared(), adalora(), Dies(), steps=STEPS, **settings())
        elif name == "tokens":
            tokens(Path(folder))
        else:
            run(Path(folder), name)


def exit_code(number, until):
    """Wait for a process, and kill it when its time is over."""
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(number, signal.SIGKILL)
        time.sleep(0.05)


def main():
    for line in sys.stdin:
        numbers = []
        for asked in json.loads(line):
            number = os.fork()
            if number == 0:
                begin(asked["environment"], asked["output"])
                return run_all(*asked["arguments"])
            numbers.append(number)
        until = time.monotonic() + LONGEST
        print(json.dumps([(number, exit_code(number, until)) for number in numbers]), flush=True)


if __name__ == "__main__":
    main()
