"""A fine-tuning run on prompts and completions, compared with HF PEFT in HF's Trainer.

    python benchmarks/fine_tuning_run.py [--examples 96] [--rounds 3] --data FOLDER

The run trains SmolLM2-135M in bf16 with LoRA of rank 8 on all linear layers. It makes one pass over
the same examples of gsm8k and medquad, half of each, drawn at random, in batches of 8. The
optimizer is AdamW at 1e-4, with clipping at 1. The prompt and the completion of a row are joined,
and the last third of the words is the completion. Lengths are thus those of the data, and a third
of every text is the completion. Each run is a process of its own, and the ways take turns:

- ours: CausalLM and CausalLMData at their defaults, and once more with `group_by_length`.
- theirs: `TrainingArguments` at their defaults, except for the batch size, the learning rate, and
  no saving. Batches are padded to their longest row.
- theirs, grouped: batches of similar length (`train_sampling_strategy="group_by_length"`).
- theirs, grouped, autocast: the same with `bf16=True`.

The faster one of the last two is "their best". Their examples are tokenized beforehand and are in
memory, so that data workers would have nothing to do.

Seconds are those of training alone, from the start of the first step to the end of the last one.
Importing, loading and tokenizing are not included. Memory is the peak resident size of the process
above its size once the model was loaded and adapted.

`--curves` trains both in float32 and compares the losses. Both have the same batches in the same
order, the same padding and the same initial factors. The script writes
benchmarks/results/fine_tuning_run.json and docs/results/fine_tuning_run.md.
"""

import argparse
import ctypes
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import common
import torch
from torch import nn

RANK, BATCH, RATE = 8, 8, 1e-4
MORE = {"grouped": {"train_sampling_strategy": "group_by_length"}, "autocast": {"bf16": True}}
WAYS = ("ours", "ours, grouped", "theirs", "theirs, grouped", "theirs, grouped, autocast")
ASKED = {"defaults": 0.5, "best": 0.7}


def resident() -> int:
    """Return the resident bytes after freed blocks are given back, and start the peak anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def files(data: Path, examples: int, folder: Path) -> Path:
    """Write rows of both sets, in turns, to one folder that CausalLMData reads."""
    random = Random(0)
    rows = [
        random.sample((data / name / "train.jsonl").read_text().splitlines(), examples // 2)
        for name in ("gsm8k", "medquad")
    ]
    lines = []
    for row in (json.loads(row) for pair in zip(*rows, strict=True) for row in pair):
        words = f"{row['prompt']} {row['completion']}".split(" ")
        cut = len(words) - max(1, len(words) // 3)
        lines.append(
            json.dumps({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])})
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split, some in (("train", lines), ("validation", lines[:BATCH])):
        (folder / f"{split}.jsonl").write_text("\n".join(some) + "\n")
    return folder


def module(dtype: str) -> Any:
    from adaptrank.modules import Adapter, CausalLM
    from adaptrank.parameterizations import LoRA

    return CausalLM(
        common.SMOLLM2,
        adapters=[Adapter([partial(LoRA, rank=RANK)])],
        dtype=dtype,
        optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0),
        warmup=0,
    )


def trainer(steps: int = -1) -> Any:
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator="cpu",
        max_epochs=1 if steps < 0 else None,
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def ours(folder: Path, grouped: bool) -> dict[str, Any]:
    from lightning.pytorch import Callback

    from adaptrank.data import CausalLMData

    found: dict[str, Any] = {"losses": []}

    class Watch(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            found["loaded"] = resident()
            found["start"] = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            found["losses"].append(outputs["loss"])

        def on_train_end(self, trainer: Any, module: Any) -> None:
            found["seconds"] = time.perf_counter() - found["start"]

    torch.manual_seed(0)
    run = trainer()
    run.callbacks.append(Watch())
    run.fit(
        module("bf16"),
        datamodule=CausalLMData(sources=str(folder), batch_size=BATCH, group_by_length=grouped),
    )
    return found


def encoded(folder: Path) -> tuple[list[dict[str, list[int]]], Any]:
    """Return the training rows, tokenized as CausalLMData does, and the tokenizer."""
    from adaptrank import backbones
    from adaptrank.data import CausalLMData

    tokenizer = backbones.load_tokenizer(backbones.resolve(common.SMOLLM2))
    data = CausalLMData(sources=str(folder), batch_size=BATCH)
    data.tokenizer = tokenizer
    rows = data.encode(data.rows("train") or [], "train")
    return [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows], tokenizer


def theirs(folder: Path, more: list[str]) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from adaptrank import backbones

    rows, tokenizer = encoded(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        backbones.resolve(common.SMOLLM2).path, dtype=torch.bfloat16
    )
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=common.LINEAR))
    found: dict[str, Any] = {"losses": []}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["loaded"] = resident()
            found["start"] = time.perf_counter()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["seconds"] = time.perf_counter() - found["start"]

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=RATE,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{key: value for name in more for key, value in MORE[name].items()},
    )
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    Trainer(model, settings, train_dataset=rows, data_collator=collate, callbacks=[Watch()]).train()
    return found


def one(way: str, folder: Path) -> dict[str, float]:
    """Train in this process: return seconds, and bytes above the loaded model at the peak."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    name, *more = way.split(", ")
    found = ours(folder, bool(more)) if name == "ours" else theirs(folder, more)
    return {"seconds": found["seconds"], "bytes": status("VmHWM") - found["loaded"]}


def curves(folder: Path, steps: int) -> dict[str, list[float]]:
    """Return the losses of both in float32, from the same batches and factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler

    from adaptrank import backbones
    from adaptrank.data import CausalLMData
    from adaptrank.parameterizations import wrapped_layers

    torch.manual_seed(0)
    ours_ = module("float32")
    data = CausalLMData(sources=str(folder), batch_size=BATCH)
    batches: list[Any] = []
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    start: dict[str, torch.Tensor] = {}

    from lightning.pytorch import Callback

    class Watch(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            start.update(
                {
                    path: layer.A.detach().clone()
                    for path, layer in wrapped_layers(module.model).items()
                }
            )

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            batches.append({key: value.clone() for key, value in batch.items()})

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            losses["ours"].append(float(outputs["loss"]))

    run = trainer(steps)
    run.callbacks.append(Watch())
    run.fit(ours_, datamodule=data)

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        backbones.resolve(common.SMOLLM2).path, dtype=torch.float32
    )
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=common.LINEAR))
    for path, A in start.items():
        model.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(A)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, 0, steps)
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        losses["theirs"].append(float(loss))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def in_a_process(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def page(found: dict[str, Any]) -> str:
    runs, tokens = found["runs"], found["tokens"]
    rows = [
        [
            way,
            common.spread(common.quartiles([r["seconds"] for r in runs[way]])),
            common.spread(common.quartiles([r["bytes"] / 2**20 for r in runs[way]])),
        ]
        for way in WAYS
    ]
    pairs = [
        [
            f"{name}: {' over '.join(found['pairs'][name])}",
            *(common.spread(one[w]) for w in ("seconds", "bytes")),
            f"{ASKED[name]} and 0.6",
        ]
        for name, one in found["ratios"].items()
    ]
    ours_, theirs_ = found["curves"]["ours"], found["curves"]["theirs"]
    steps = [
        [str(i + 1), f"{a:.6f}", f"{b:.6f}", f"{a - b:+.1e}"]
        for i, (a, b) in enumerate(zip(ours_, theirs_, strict=True))
    ]
    return (
        "\n\n".join(
            [
                "# A fine-tuning run",
                common.paragraph(
                    f"SmolLM2-135M in bf16 is trained with LoRA of rank {RANK} on all linear",
                    f"layers. The data are {found['examples']} examples of gsm8k and medquad in",
                    f"batches of {BATCH}, with {tokens['mean']:.0f} tokens on average and",
                    f"{tokens['completion']:.0%} of them in completions. Each run is a process of",
                    f"its own. The runs took turns, {found['rounds']} times. This page is written",
                    f"by `python benchmarks/fine_tuning_run.py --examples {found['examples']}",
                    f"--rounds {found['rounds']}`, which explains each way.",
                ),
                common.on(found["machine"]),
                common.table(["way", "seconds", "MiB above the loaded model, at the peak"], rows),
                common.paragraph(
                    "Ours over HF PEFT in HF's Trainer, within a round. Their best is the faster",
                    "of their two grouped ways.",
                ),
                common.table(["settings", "time", "memory", "asked"], pairs),
                "## The same loss curve",
                common.paragraph(
                    "In float32, with the same batches in the same order, the same padding and the",
                    "same initial factors.",
                ),
                common.table(["step", "ours", "HF PEFT", "difference"], steps),
            ]
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of the loss curves")
    parser.add_argument("--data", type=Path, help="folder of data sets: gsm8k, medquad, trec")
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument(
        "--one", nargs=2, help="used by the script itself: a way, and the folder of the data"
    )
    parser.add_argument("--curves", help="used by the script itself: the folder of the data")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(one(options.one[0], Path(options.one[1]))))
        return
    if options.curves:
        print(json.dumps(curves(Path(options.curves), options.steps)))
        return
    if options.data is None:
        parser.error("--data FOLDER is needed: where gsm8k/train.jsonl and medquad/train.jsonl are")
    with tempfile.TemporaryDirectory() as temporary:
        folder = files(options.data, options.examples, Path(temporary) / "data")
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
        for _ in range(options.rounds):
            for way in options.ways:
                runs[way].append(in_a_process("--one", way, str(folder)))
                print(way, runs[way][-1], flush=True)
        if options.dry:
            return
        rows, _ = encoded(folder)
        lengths = [len(row["input_ids"]) for row in rows]
        supervised = sum(sum(label != -100 for label in row["labels"]) for row in rows)
        losses = in_a_process("--curves", str(folder), "--steps", str(options.steps))
    best = min(WAYS[3:], key=lambda way: statistics.median(run["seconds"] for run in runs[way]))
    pairs = {"defaults": ("ours", "theirs"), "best": ("ours, grouped", best)}
    ratios = {
        name: {
            what: common.quartiles(
                [a[what] / b[what] for a, b in zip(runs[mine], runs[other], strict=True)]
            )
            for what in ("seconds", "bytes")
        }
        for name, (mine, other) in pairs.items()
    }
    found = {
        "machine": common.machine(),
        "examples": options.examples,
        "rounds": options.rounds,
        "tokens": {"mean": sum(lengths) / len(lengths), "completion": supervised / sum(lengths)},
        "runs": runs,
        "pairs": pairs,
        "ratios": ratios,
        "curves": losses,
    }
    common.write("fine_tuning_run", found, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
