"""A training step of every method, compared with the frozen floor and with HF PEFT.

    python benchmarks/training_step.py [--workloads stack smollm2 minilm wide] --data FOLDER

The floor is the same backbone, forward and backward, with gradients through the activations and
without an adapter. The embeddings take the gradient. It makes no optimizer step. All other variants
make whole steps: forward, backward, the penalty of the SVD form, clipping at 1, fused AdamW (the
default of both libraries), and dropping the gradients. HF PEFT is compared where it has the method.

- stack: 8 layers of SmolLM2-135M's shapes, random weights, no head, 8 x 128 tokens, all linear
  layers.
- smollm2: SmolLM2-135M on gsm8k, 8 examples in a batch, with the loss on the completions, computed
  as each library does.
- minilm: MiniLM-L6 that classifies TREC's questions, 32 in a batch.
- wide: four linear layers between 2048 and 4096, with 512 tokens, where nothing hides the adapter.

In a round every variant makes one step. Ratios are taken within a round, and the table has medians
and quartiles. Earlier figures of other workloads stay on the page, with the `note` that stands in
the JSON file. The script writes
benchmarks/results/training_step.json and docs/results/training_step.md.
"""

import argparse
import gc
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

from adaptrank import PARAMETERIZATIONS, adapt, testing
from adaptrank.parameterizations import Parameterization
from adaptrank.training.penalties import add_penalty_gradients

RANK = 8
ASKED = {
    "LoRA": (0.95, 0.82),
    "SVD": (0.95, 0.7),
    "DoRA": (0.75, 0.65),
    "LoKr": (0.6, 0.45),
    "MiSS": (1.0, 0.9),
}
"""Target of the ratio to HF PEFT: (fp32, bf16)."""
FLOOR = {"HyperAdapt": 1.10, "LoRA": 1.10}
Loss = Callable[[nn.Module], Tensor]


def theirs(method: str, names: str | list[str]) -> Any:
    """Return HF PEFT's configuration of one of our methods."""
    import peft

    common_ = {"target_modules": names}
    return {
        "LoRA": lambda: peft.LoraConfig(r=RANK, lora_alpha=16, **common_),
        "DoRA": lambda: peft.LoraConfig(r=RANK, lora_alpha=16, use_dora=True, **common_),
        "SVD": lambda: peft.AdaLoraConfig(
            init_r=RANK, target_r=RANK, lora_alpha=16, total_step=10**6, **common_
        ),
        "LoKr": lambda: peft.LoKrConfig(r=RANK, alpha=16, **common_),
        "MiSS": lambda: peft.MissConfig(r=RANK, **common_),
    }[method]()


def ours(cls: type[Parameterization]) -> Callable[[nn.Module], Parameterization]:
    return partial(cls, rank=RANK) if "rank" in inspect.signature(cls).parameters else cls


def step(model: nn.Module, loss: Loss) -> Callable[[], float]:
    penalized = any(
        isinstance(m, Parameterization) and m.penalty() is not None for m in model.modules()
    )
    penalty = partial(add_penalty_gradients, model) if penalized else lambda: None
    return common.step(model, partial(loss, model), penalty)


# ---- workloads: (backbone, loss of ours, loss of theirs, targets of both)


def stack(
    dtype: torch.dtype, data: Path
) -> tuple[Callable[[], nn.Module], Loss, Loss, str | list[str]]:
    from transformers import LlamaConfig, LlamaModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        return LlamaModel(
            LlamaConfig(num_hidden_layers=8, **{**common.SHAPES, "vocab_size": 64})
        ).to(dtype)

    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 128, 576, generator=random).to(dtype).requires_grad_()
    weights = torch.randn(8, 128, 576, generator=random).to(dtype)

    def loss(model: nn.Module) -> Tensor:
        x.grad = None
        return (model(inputs_embeds=x).last_hidden_state * weights).sum() / len(weights)

    return build, loss, loss, common.LINEAR


def smollm2(
    dtype: torch.dtype, data: Path
) -> tuple[Callable[[], nn.Module], Loss, Loss, str | list[str]]:
    from transformers import AutoModelForCausalLM

    from adaptrank import backbones
    from adaptrank.data import causal_batch
    from adaptrank.modules import Adapter, CausalLM

    source = backbones.resolve(common.SMOLLM2)
    tokenizer = backbones.load_tokenizer(source)
    examples = []
    for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()[:8]:
        example = json.loads(line)
        prompt, completion = (tokenizer(example[k])["input_ids"] for k in ("prompt", "completion"))
        ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        labels = ids.clone()
        labels[: len(prompt)] = -100
        examples.append({"input_ids": ids, "labels": labels})
    batch = causal_batch(examples, tokenizer.pad_token_id)
    shell = CausalLM(common.SMOLLM2, adapters=[Adapter([PARAMETERIZATIONS["LoRA"]])])

    def build() -> nn.Module:
        model = backbones.load_model(source, AutoModelForCausalLM, dtype)
        model.config.use_cache = False
        return model

    def our_loss(model: nn.Module) -> Tensor:
        shell.backbone = model
        return shell(batch["input_ids"], batch["attention_mask"], batch["labels"])[0].mean()

    return build, our_loss, lambda model: model(**batch).loss, common.LINEAR


def minilm(
    dtype: torch.dtype, data: Path
) -> tuple[Callable[[], nn.Module], Loss, Loss, str | list[str]]:
    from transformers import AutoModelForSequenceClassification

    from adaptrank import backbones

    source = backbones.resolve(common.MINILM)
    tokenizer = backbones.load_tokenizer(source)
    lines = [
        json.loads(line) for line in (data / "trec" / "train.jsonl").read_text().splitlines()[:32]
    ]
    batch = dict(tokenizer([line["text"] for line in lines], padding=True, return_tensors="pt"))
    labels = torch.tensor([line["label"] for line in lines])

    def build() -> nn.Module:
        torch.manual_seed(0)
        return backbones.load_model(source, AutoModelForSequenceClassification, dtype, num_labels=6)

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(**batch).logits.float(), labels)

    return build, loss, loss, r".*encoder.*\.(query|key|value|dense)"


def wide(
    dtype: torch.dtype, data: Path
) -> tuple[Callable[[], nn.Module], Loss, Loss, str | list[str]]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(*sides, bias=False) for sides in [(2048, 4096), (4096, 2048)] * 2)
        ).to(dtype)

    random = torch.Generator().manual_seed(0)
    x = torch.randn(512, 2048, generator=random).to(dtype).requires_grad_()

    def loss(model: nn.Module) -> Tensor:
        x.grad = None
        return model(x).square().mean()

    return build, loss, loss, ["0", "1", "2", "3"]


WORKLOADS = {"stack": stack, "smollm2": smollm2, "minilm": minilm, "wide": wide}


def variants(
    workload: str, dtype: torch.dtype, data: Path, methods: list[str]
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield (name, step) of the floor, of ours, of theirs, and of full fine-tuning."""
    from peft import get_peft_model

    build, our_loss, their_loss, targets = WORKLOADS[workload](dtype, data)
    frozen = build().requires_grad_(False)
    embed(frozen)
    yield "floor", step(frozen, our_loss)
    for method in methods:
        torch.manual_seed(0)
        try:
            model = adapt(build(), targets, ours(PARAMETERIZATIONS[method]))
        except ValueError as error:
            warnings.warn(f"{method} on {workload}: {error}", stacklevel=1)
            continue
        for module in model.modules():
            if isinstance(module, Parameterization):
                testing.perturb(module, std=0.01)
        yield method, step(model, our_loss)
    for method in ASKED.keys() & set(methods):
        torch.manual_seed(0)
        model = get_peft_model(build(), theirs(method, targets))
        yield f"PEFT {method}", step(model, their_loss)
    whole = build()
    yield "full", step(whole, our_loss)


def embed(model: nn.Module) -> None:
    """Let the embeddings' output take a gradient, where the model starts from tokens."""
    if hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_()
        )


def linear_methods() -> list[str]:
    """Return every method of the library that wraps a linear layer."""
    known = {n: c for n, c in PARAMETERIZATIONS.items() if c.__module__.startswith("adaptrank.")}
    return [name for name, cls in known.items() if cls.wraps(nn.Linear(768, 768))]


def measure(
    workload: str, dtype: str, rounds: int, data: Path, methods: list[str]
) -> dict[str, Any]:
    runs = dict(variants(workload, common.DTYPES[dtype], data, methods))
    seconds = common.interleaved(runs, rounds, warm=2)
    rows = {
        name: {"floor": common.ratios(seconds, name, "floor")} for name in runs if name != "floor"
    }
    for name in rows:
        if f"PEFT {name}" in runs:
            rows[name]["peft"] = common.ratios(seconds, name, f"PEFT {name}")
    return {"floor_ms": common.quartiles([1000 * s for s in seconds["floor"]]), "methods": rows}


def page(found: Mapping[str, Any]) -> str:
    dtypes = list(common.DTYPES)
    parts = [
        "# A training step",
        common.paragraph(
            "Time of a training step of every method that wraps linear layers, over the **frozen",
            "floor**: the same backbone, forward and backward, with gradients through the",
            "activations, without an adapter and without an optimizer. The tables show medians and",
            f"quartiles of ratios within interleaved rounds. The rank is {RANK} where there is a",
            "rank, on all linear layers. This page is written by `python",
            "benchmarks/training_step.py`, which describes the workloads.",
        ),
    ]
    for workload, by_dtype in found["workloads"].items():
        have_dtypes = [d for d in dtypes if d in by_dtype]
        floors = " and ".join(
            f"{by_dtype[d]['floor_ms']['median']:.0f} ms in {d}" for d in have_dtypes
        )
        names = sorted(
            {n for d in have_dtypes for n in by_dtype[d]["methods"]},
            key=lambda n: min(
                m["floor"]["median"] for d in have_dtypes if (m := by_dtype[d]["methods"].get(n))
            ),
        )
        rows = []
        for name in names:
            have = [by_dtype.get(d, {"methods": {}})["methods"].get(name, {}) for d in dtypes]
            rows.append(
                [
                    name,
                    *(common.spread(h.get("floor")) for h in have),
                    *(common.spread(h.get("peft")) for h in have),
                ]
            )
        header = [
            "method",
            *(f"over the floor, {d}" for d in dtypes),
            *(f"over PEFT's, {d}" for d in dtypes),
        ]
        said = common.paragraph(
            f"The floor takes {floors}. There were {by_dtype['rounds']} rounds.",
            common.on(by_dtype["machine"]),
            by_dtype.get("note", ""),
        ).rstrip()
        parts += [f"## {workload}", said, common.table(header, rows)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="*", choices=common.DTYPES, default=list(common.DTYPES))
    parser.add_argument(
        "--methods",
        nargs="*",
        default=None,
        help="default: all on stack in bf16, elsewhere those with a target",
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--data", type=Path, help="folder of data sets: gsm8k, medquad, trec")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if options.data is None and {"smollm2", "minilm"} & set(options.workloads):
        parser.error("--data FOLDER is needed: where gsm8k/train.jsonl and trec/train.jsonl are")
    file = common.ROOT / "benchmarks" / "results" / "training_step.json"
    before = json.loads(file.read_text())["workloads"] if file.is_file() else {}
    workloads: dict[str, Any] = {name: before[name] for name in WORKLOADS if name in before}
    for workload in options.workloads:
        by_dtype = workloads[workload] = {"rounds": options.rounds, "machine": common.machine()}
        for dtype in options.dtypes:
            methods = options.methods or (
                linear_methods()
                if (workload, dtype) == ("stack", "bf16")
                else ["HyperAdapt", *ASKED]
            )
            by_dtype[dtype] = measure(workload, dtype, options.rounds, options.data, methods)
            gc.collect()
            print(workload, dtype, by_dtype[dtype]["floor_ms"])
            for name, row in by_dtype[dtype]["methods"].items():
                floor, peft = common.spread(row["floor"]), common.spread(row.get("peft"))
                print(f"  {name:22} {floor:24} {peft}", flush=True)
        if not options.dry:
            found = {
                "workloads": {name: workloads[name] for name in WORKLOADS if name in workloads}
            }
            common.write("training_step", found, page(found))


if __name__ == "__main__":
    main()
