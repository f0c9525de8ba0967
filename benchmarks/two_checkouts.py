"""Time one training step of this checkout and of another one, interleaved.

    python benchmarks/two_checkouts.py --other FOLDER [--rounds 8] [--methods LoRA SVD]

The workload is the stack of training_step.py: 8 layers of SmolLM2-135M's shapes in bf16, 8 x 128
tokens, all linear layers, unless options say otherwise. Three processes live side by side: this
checkout, the other one, and the
other one again as a control. In a round each makes the same steps, one process at a time. Ratios
are taken within a round. A change of speed is real if the ratio of this checkout to the other lies
outside of the spread of the control. The script prints a table and writes nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

SUMMARY = "Time one training step of this checkout and of another one, interleaved."
HERE = Path(__file__).resolve().parents[1]

WORKER = """
import sys, time, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(int(sys.argv[1]))
dtype = getattr(torch, sys.argv[2])
size = (int(sys.argv[3]), int(sys.argv[4]), 576)
from transformers import LlamaConfig, LlamaModel
import adaptrank
from adaptrank import adapt
from adaptrank import PARAMETERIZATIONS
from adaptrank.testing import perturb

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9,
              num_key_value_heads=3, vocab_size=64, num_hidden_layers=8)
try:
    from adaptrank.training.penalties import add_penalty_gradients as add_penalty
except ImportError:
    from adaptrank.regularize import penalty_gradients as add_penalty
random = torch.Generator().manual_seed(0)
x = torch.randn(size, generator=random).to(dtype).requires_grad_()
weights = torch.randn(size, generator=random).to(dtype)
steps = {}

def prepare(name):
    torch.manual_seed(0)
    model = adapt(LlamaModel(LlamaConfig(**SHAPES)).to(dtype), LINEAR, PARAMETERIZATIONS[name])
    for module in model.modules():
        if isinstance(module, adaptrank.Parameterization):
            perturb(module, std=0.01)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step():
        x.grad = None
        loss = (model(inputs_embeds=x).last_hidden_state * weights).sum() / len(weights)
        loss.backward()
        if name == "SVD":
            add_penalty(model)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    steps[name] = step

for line in sys.stdin:
    name, count = line.split()
    if name not in steps:
        prepare(name)
        steps[name]()
    start = time.perf_counter()
    for _ in range(int(count)):
        loss = steps[name]()
    print((time.perf_counter() - start) / int(count), loss, flush=True)
"""


class Worker:
    """A process that imports adaptrank from one checkout, and makes steps when it is asked."""

    def __init__(self, checkout: Path, settings: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", WORKER, *settings]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=checkout,
        )

    def steps(self, method: str, count: int) -> tuple[float, float]:
        """Return (seconds a step, loss of the last step)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{method} {count}\n")
        self.process.stdin.flush()
        seconds, loss = self.process.stdout.readline().split()
        return float(seconds), float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--other", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps of a method in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=["LoRA", "HyperAdapt", "DoRA", "SVD"])
    options = parser.parse_args()
    settings = [str(options.threads), options.dtype, str(options.batch), str(options.tokens)]
    new = Worker(HERE, settings)
    old, control = (Worker(options.other.resolve(), settings) for _ in range(2))
    workers = [old, new, control]
    print(f"{'method':12} {'new / old':>22} {'control / old':>22}  equal losses", flush=True)
    for method in options.methods:
        for worker in workers:
            worker.steps(method, 1)
        ratios: dict[str, list[float]] = {"new": [], "control": []}
        equal = True
        for number in range(options.rounds):
            order = workers if number % 2 else workers[::-1]
            results = {id(worker): worker.steps(method, options.steps) for worker in order}
            seconds, loss = results[id(old)]
            ratios["new"].append(results[id(new)][0] / seconds)
            ratios["control"].append(results[id(control)][0] / seconds)
            equal = equal and results[id(new)][1] == loss
        columns = f"{spread(ratios['new']):>22} {spread(ratios['control']):>22}"
        print(f"{method:12} {columns}  {equal}", flush=True)
    for worker in workers:
        worker.process.kill()


def spread(ratios: list[float]) -> str:
    """Return the median, and the smallest and the largest ratio."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
