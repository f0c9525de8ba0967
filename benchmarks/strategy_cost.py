"""Cost of a training strategy: time of a step, time of a border, memory, against plain LoRA.

    python benchmarks/strategy_cost.py [--rounds 6] [--every 4] [--layers 8] [--threads 2]

The model is a Llama of SmolLM2-135M's shapes without a head: random weights, bf16 where the CPU is
fast at it, all linear layers adapted. A batch has 4 x 128 tokens. The optimizer is AdamW, with
clipping at 1. Every variant makes one step in turn, so that a slow moment of the machine affects
all of them. A round has `every` steps. The first round warms up.

- step: a step without a border, over a step of plain LoRA at the same turn. It is shown for the
  second round, and for the last one, in which the ledger of merged updates is larger.
- border: `strategy.step` where a round ends, over a step of plain LoRA at the same turn.
- memory: numbers that train, each of which takes 16 bytes with Adam in float32 (value, gradient,
  two moments). Bytes that the forward pass keeps for the backward pass. Bytes of what earlier
  rounds left: the ledger, or the frozen directions of SD-LoRA.

SD-LoRA has a task for each round. PT-PEFT has two stages: the first and the second round train the
prefix alone, and the others all adapters.

The script writes benchmarks/results/strategy_cost.json, and the section "Training strategies" of
docs/results/allocator_cost.md.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import growth
import torch
from torch import Tensor, nn

from adaptrank import adapt, backbones, parameter_groups
from adaptrank.parameterizations import LoRA, MergedUpdates, Prefix, wrappers
from adaptrank.parameterizations.decoupled_lora import DecoupledLoRA
from adaptrank.strategies import STRATEGIES, TrainingStrategy

HEADING = "## Training strategies"
NAME = "strategy_cost"
DTYPE = backbones.auto_dtype("auto")
RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        method: makes the wrapper of a linear layer.
        strategy: class of the strategy, "" for none.
        arguments: (steps of a round, number of rounds) -> arguments of the strategy.
        prefix: whether the model has a prefix of 20 tokens as well.
    """

    method: Callable[[nn.Module], nn.Module]
    strategy: str = ""
    arguments: Callable[[int, int], dict[str, Any]] = lambda every, rounds: {"every": every}
    prefix: bool = False


LORA = partial(LoRA, rank=8)
CASES: dict[str, Case] = {
    "LoRA, rank 8": Case(LORA),
    "ReLoRA, rank 8": Case(
        LORA, "ReLoRA", lambda every, rounds: {"every": every, "restart_warmup": 1}
    ),
    "Chain of LoRA, rank 8": Case(LORA, "ChainOfLoRA", lambda every, rounds: {"links": rounds}),
    "RAC-LoRA, rank 16": Case(partial(LoRA, rank=16), "RACLoRA"),
    "XGBLoRA, rank 8, a third of the blocks": Case(LORA, "XGBLoRA"),
    "XGBLoRA, rank 1, a third of the blocks": Case(partial(LoRA, rank=1), "XGBLoRA"),
    "SD-LoRA, rank 8": Case(
        partial(DecoupledLoRA, rank=8),
        "SDLoRA",
        lambda every, rounds: {"steps_per_task": [every] * rounds},
    ),
    "PT-PEFT, 20 tokens and rank 8": Case(
        LORA, "PTPEFT", lambda every, rounds: {"stage1": 2 * every, "warmup": 1}, prefix=True
    ),
}
"""Name -> case. The first one is the baseline."""
PLAIN = next(iter(CASES))


class Variant:
    """A model that makes steps.

    Args:
        case: row of the table.
        layers: blocks of the model.
        every: steps of a round.
        rounds: rounds that are measured, after the one that warms up.
    """

    def __init__(self, case: Case, layers: int, every: int, rounds: int) -> None:
        self.model: nn.Module = growth.llama(layers, dtype=DTYPE)
        adapt(self.model, "all-linear", case.method)
        if case.prefix:
            self.model = Prefix(self.model, tokens=20)
        self.strategy: TrainingStrategy | None = None
        if case.strategy:
            self.strategy = STRATEGIES[case.strategy](**case.arguments(every, rounds + 1))
            self.strategy.engine.prepare(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # PT-PEFT trains the prefix at a rate of its own, and so needs a group for it.
        own_rates = {"Prefix": RATE} if case.prefix else {}
        groups = parameter_groups(self.model, learning_rates=own_rates)
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0, fused=True)
        if self.strategy is not None:
            self.strategy.start(self.model, self.optimizer, every * (rounds + 1))
        self.borders: list[tuple[int, float]] = []
        """(turn, seconds) of each border."""
        self.turns = 0

    def step(self, x: Tensor) -> float:
        """Make a step, and return its seconds without those of a border."""
        self.turns += 1
        start = time.perf_counter()
        self.model(inputs_embeds=x).last_hidden_state.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        if self.strategy is None:
            return end - start
        event = self.strategy.step()
        after = time.perf_counter()
        if event is None:
            return after - start
        self.borders.append((self.turns - 1, after - end))
        return end - start

    def memory(self, x: Tensor) -> dict[str, int]:
        """Return numbers that train, bytes kept for the backward pass, and bytes of old rounds."""
        trained = sum(p.numel() for p in self.trained if p.requires_grad)
        stored = 0
        for wrapper in wrappers(self.model):
            if isinstance(wrapper, MergedUpdates):
                stored += sum(tensor.nbytes for tensor in wrapper.own_tensors().values())
            elif isinstance(wrapper, DecoupledLoRA):
                stored += wrapper.A_past.nbytes + wrapper.B_past.nbytes
        return {"trained": trained, "kept": growth.kept(self.model, x), "stored": stored}


def measure(rounds: int, every: int, layers: int) -> dict[str, Any]:
    """Return the figures of every case."""
    variants = {name: Variant(case, layers, every, rounds) for name, case in CASES.items()}
    x = growth.inputs(variants[PLAIN].model, 4, 128).detach().to(DTYPE).requires_grad_()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(every * (rounds + 1)):
        for name, variant in variants.items():
            x.grad = None
            seconds[name].append(variant.step(x))
        print(f"step {turn}: {', '.join(f'{seconds[n][-1]:.2f}' for n in variants)}", flush=True)
    plain = seconds[PLAIN]
    figures = {}
    for name, variant in variants.items():
        ratios = [a / b for a, b in zip(seconds[name], plain, strict=True)]
        borders = [duration / plain[turn] for turn, duration in variant.borders]
        figures[name] = {
            "first": common.quartiles(ratios[every : 2 * every]),
            "last": common.quartiles(ratios[-every:]),
            # The first border warms up, where there is another one.
            "border": common.quartiles(borders[1:] or borders) if borders else None,
            **variant.memory(x),
        }
    return {
        "machine": common.machine(),
        "load": round(os.getloadavg()[0], 1),
        "rounds": rounds,
        "every": every,
        "layers": layers,
        "dtype": str(DTYPE).removeprefix("torch."),
        "step_seconds": common.quartiles(plain[every:]),
        "figures": figures,
    }


def section(result: dict[str, Any]) -> str:
    """Return the section of the page."""
    rows = []
    for name, row in result["figures"].items():
        border = row["border"]
        rows.append(
            [
                name,
                common.spread(row["first"]),
                common.spread(row["last"]),
                "" if border is None else common.spread(border),
                f"{row['trained']:,}",
                f"{row['kept'] / 2**20:.1f}",
                f"{row['stored'] / 2**20:.2f}",
            ]
        )
    seconds = result["step_seconds"]
    rounds, every, layers = result["rounds"], result["every"], result["layers"]
    threads = result["machine"]["threads"]
    sizes = f"--rounds {rounds} --every {every} --layers {layers} --threads {threads}"
    intro = common.paragraph(
        f"The model is a Llama of SmolLM2-135M's shapes with {layers} blocks and without a head",
        f"(random weights, {result['dtype']}), with LoRA on all linear layers. A batch has 4 x 128",
        f"tokens, and a round {every} steps. A step of plain LoRA takes",
        f"{seconds['median']:.3f} s (quartiles {seconds['low']:.3f} to {seconds['high']:.3f}).",
        "Steps and borders are over such a step at the same turn, with quartiles in brackets. Old",
        f"rounds are the ledger of {rounds} merged rounds, or the directions of {rounds} tasks.",
        "The second round of PT-PEFT belongs to its stage 1, and the last one to stage 2. This",
        "section is written by",
        f"`python benchmarks/strategy_cost.py {sizes}`.",
    )
    if result["load"] > result["machine"]["cores"] + 1:
        intro += "\n\n" + common.paragraph(
            f"The machine did other work meanwhile, with a load of {result['load']}. So the",
            "seconds mean little, and ratios are rough. Counts and bytes are exact.",
        )
    header = [
        "strategy",
        "step, second round",
        "step, last round",
        "border",
        "numbers that train",
        "MiB kept for the backward pass",
        "MiB of old rounds",
    ]
    parts = [HEADING, intro, common.on(result["machine"]), common.table(header, rows)]
    return "\n\n".join(parts) + "\n"


def put_section(page: str, result: dict[str, Any]) -> str:
    """Return a page that ends with the section, in the place of an earlier one."""
    return f"{page.partition(HEADING)[0].rstrip()}\n\n{section(result)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.rounds, options.every, options.layers)
    common.write(NAME, result)
    file = common.ROOT / "docs" / "results" / "allocator_cost.md"
    file.write_text(put_section(file.read_text(encoding="utf-8"), result), encoding="utf-8")
    print(section(result))


if __name__ == "__main__":
    main()
