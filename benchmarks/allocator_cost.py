"""Cost of an allocator: its share of a training step, and the time of an event against a step.

    python benchmarks/allocator_cost.py [--rounds 8] [--layers 30] [--threads 2]

The model is a Llama of SmolLM2-135M's shapes: random weights, 30 layers, bf16 where the CPU is fast
at it, all linear layers in the SVD form of rank 8. A batch has 8 x 128 tokens. The optimizer is
AdamW, with clipping at 1. In every round each variant makes one step, so that a slow moment of the
machine affects all of them:

- none: no allocator. The other variants are compared with it. The orthogonality penalty of the SVD
  form is part of every variant's step.
- our allocator with each score that needs no data of its own. An event prunes in half of the
  rounds. Scoring is `before_step` without the penalty, and `step` in rounds without an event. The
  event is `step` in rounds with one.
- HF PEFT's AdaLoRA with `update_and_allocate` called after every step, as its documentation says.
  Its forward pass adds the orthogonality to the loss, which is part of its step and not of its
  scoring. It scores and masks in one call. From its `tinit` on there is an event at every `deltaT`.

Shares are taken within a round, over the step of `none` in that round. The table has medians and
quartiles. The script writes benchmarks/results/allocator_cost.json and
docs/results/allocator_cost.md.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import strategy_cost
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank import Allocator, adapt, backbones
from adaptrank.allocation.scores.importance import IMPORTANCES
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import SVD
from adaptrank.training.penalties import add_penalty_gradients

RANK, BATCH, LENGTH = 8, 8, 128


def backbone(layers: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **common.SHAPES)).to(dtype)


class Half(Allocator):
    """Allocator that prunes a little at every second step, so that every event has work."""

    def __init__(self, importance: str, rounds: int) -> None:
        super().__init__(budget=1, every=2, warmup=0, final=1)
        self.importance, self.rounds = importance, rounds

    def budget_at(self, step: int) -> int:
        start = self.run.start_total
        return start - step * start // (4 * self.rounds)


class Variant:
    """A model that makes steps. `parts` holds the seconds of the last one."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[], None],
        after: Callable[[], Any],
        penalized: bool = True,
    ) -> None:
        self.model, self.before, self.after, self.penalized = model, before, after, penalized
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)
        self.parts: dict[str, float] = {}

    def step(self, batch: torch.Tensor) -> None:
        start = time.perf_counter()
        self.model(input_ids=batch, labels=batch).loss.backward()
        if self.penalized:
            add_penalty_gradients(self.model)
        penalty = time.perf_counter()
        self.before()
        clip = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()
        stepped = time.perf_counter()
        self.after()
        after = time.perf_counter()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        self.parts = {
            "before": clip - penalty,
            "after": after - stepped,
            "rest": (penalty - start) + (stepped - clip) + (end - after),
        }


def ours(importance: str | None, layers: int, dtype: torch.dtype, rounds: int) -> Variant:
    model = adapt(backbone(layers, dtype), "all-linear", partial(SVD, rank=RANK))
    if importance is None:
        return Variant(model, lambda: None, lambda: None)
    allocator = Half(importance, rounds)
    # The engine's own call leaves out the penalty, which `Variant` times apart.
    variant = Variant(model, allocator.engine.before_step, allocator.step)
    # The run is longer than what is measured, so that scoring never ends.
    allocator.start(model, variant.optimizer, 2 * rounds + 2)
    return variant


def theirs(layers: int, dtype: torch.dtype, rounds: int) -> Variant:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        target_modules=common.LINEAR,
        init_r=RANK,
        target_r=RANK // 2,
        tinit=1,
        tfinal=1,
        deltaT=2,
        total_step=rounds + 3,
    )
    model = get_peft_model(backbone(layers, dtype), config, autocast_adapter_dtype=True)
    steps = [0]

    def after() -> None:
        steps[0] += 1
        model.base_model.update_and_allocate(steps[0])

    return Variant(model, lambda: None, after, penalized=False)  # it is in the forward pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = backbones.auto_dtype("auto")
    names = [name for name, score in IMPORTANCES.items() if not score.examples]
    variants = {"none": ours(None, options.layers, dtype, options.rounds)}
    variants |= {name: ours(name, options.layers, dtype, options.rounds) for name in names}
    variants["PEFT AdaLoRA"] = theirs(options.layers, dtype, options.rounds)
    batch = torch.randint(49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    measured: dict[str, dict[str, list[float]]] = {
        name: {"scoring": [], "event": [], "step": []} for name in variants
    }
    base: list[float] = []
    for number in range(options.rounds + 1):
        for name, variant in variants.items():
            variant.step(batch)
            parts = variant.parts
            if not number:
                continue  # the first round warms up
            if name == "none":
                base.append(sum(parts.values()))
            event = number % 2 == 1  # the allocators count the warm-up as their first step
            row = measured[name]
            row["step"].append(sum(parts.values()) / base[-1])
            if event and name != "none":
                row["event"].append(parts["after"] / base[-1])
                row["scoring"].append(
                    parts["before"] / base[-1]
                ) if name != "PEFT AdaLoRA" else None
            else:
                row["scoring"].append((parts["before"] + parts["after"]) / base[-1])
        seconds = [f"{n} {sum(v.parts.values()):.2f}" for n, v in variants.items()]
        print(f"round {number}: {', '.join(seconds)}", flush=True)

    table = {
        name: {part: common.quartiles(values) for part, values in row.items() if values}
        for name, row in measured.items()
    }
    sizes = {
        name: sum(map(len, rank_axes(v.model).values()))
        for name, v in variants.items()
        if name != "PEFT AdaLoRA"
    }
    result = {
        "machine": common.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": options.layers,
        "step_seconds": common.quartiles(base),
        "ratios": table,
        "units": sizes,
    }
    text = page(result, options)
    strategies = common.ROOT / "benchmarks" / "results" / f"{strategy_cost.NAME}.json"
    if strategies.is_file():
        text = strategy_cost.put_section(text, json.loads(strategies.read_text(encoding="utf-8")))
    common.write("allocator_cost", result, text)
    print(text)


def page(result: dict[str, Any], options: argparse.Namespace) -> str:
    def cell(row: dict[str, dict[str, float]], part: str) -> str:
        if part not in row:
            return ""
        percent = {key: 100 * value for key, value in row[part].items()}
        return "{median:.2f} % ({low:.2f} to {high:.2f})".format(**percent)

    rows = [
        [name, cell(row, "scoring"), cell(row, "event"), f"{row['step']['median']:.3f}"]
        for name, row in result["ratios"].items()
        if name != "none"
    ]
    seconds = result["step_seconds"]
    intro = common.paragraph(
        f"The model is a Llama of SmolLM2-135M's shapes ({result['layers']} layers, random",
        f"weights, {result['dtype']}), with all linear layers in the SVD form of rank {RANK}. A",
        f"batch has {BATCH} x {LENGTH} tokens, and the optimizer is AdamW. Shares are those of the",
        f"step without allocator in the same round ({seconds['median']:.2f} s, quartiles",
        f"{seconds['low']:.2f} to {seconds['high']:.2f}). The table has medians of",
        f"{options.rounds} interleaved rounds, and quartiles in brackets. This page is written by",
        f"`python benchmarks/allocator_cost.py --rounds {options.rounds}`.",
    )
    end = common.paragraph(
        "PEFT's `update_and_allocate` scores in every call. Where it also masks, its row counts",
        "the call as an event. The target is at most 3 % of a step for scoring, and an event that",
        "takes no longer than a step.",
    )
    header = ["score", "scoring, of a step", "event, of a step", "whole step, ratio"]
    parts = [
        "# What an allocator costs",
        intro,
        common.on(result["machine"]),
        common.table(header, rows),
        end,
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
