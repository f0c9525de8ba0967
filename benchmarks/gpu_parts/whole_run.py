"""A whole fine-tuning run, compared with HF PEFT in HF's Trainer.

The texts are random tokens of real lengths. No data set travels with the script, so lengths are
drawn from log-normal distributions that were fitted to the 7,000 training examples of gsm8k, in
tokens of SmolLM2. Prompts and completions have a correlation of 0.54 there.

The ways are

- ours: CausalLM and its data at their defaults, in bf16, and once more with `group_by_length`.
- theirs: `TrainingArguments` at their defaults, except for batch size, learning rate and no saving.
- theirs, grouped, bf16: batches of similar length, and `bf16=True`.
- theirs, grouped, bf16, Liger: the same with Liger's kernels. This way comes after all rounds of
  the others, because Liger changes transformers' classes.

The time is that from the end of step WARM to the end of the last step. Memory is the peak above
the loaded and adapted model.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from random import Random
from typing import Any

import common
import torch
from torch import nn

from gpu_parts.clock import Deadline
from gpu_parts.measures import MIB, Device, one_line
from gpu_parts.models import frozen, sharing
from gpu_parts.settings import Settings, Size

PROMPT, COMPLETION = (4.122, 0.318, 17, 228), (4.449, 0.434, 25, 343)
"""Mean and deviation of the logarithm of the lengths, and the shortest and longest length."""
CORRELATION = 0.536
RANK, RATE = 8, 1e-4
WARM = 2
WAYS = ("ours", "ours, grouped", "theirs", "theirs, grouped, bf16", "theirs, grouped, bf16, Liger")
LIGER = WAYS[-1]
PAIRS = (("ours", "theirs"), ("ours, grouped", "theirs, grouped, bf16"))
LLAMA = "transformers.models.llama.modeling_llama"
NEEDS = ("lightning", "jsonargparse", "torchmetrics", "peft", "accelerate")
"""Modules without which this part is left out."""
Row = dict[str, Any]


def lengths(count: int) -> list[tuple[int, int]]:
    """Return lengths of prompts and completions."""
    random = Random(0)
    pairs = []
    for _ in range(count):
        first, second = random.gauss(), random.gauss()
        second = CORRELATION * first + math.sqrt(1 - CORRELATION**2) * second
        pairs.append((length(first, PROMPT), length(second, COMPLETION)))
    return pairs


def length(normal: float, fitted: tuple[float, float, int, int]) -> int:
    mean, deviation, least, most = fitted
    return min(max(round(math.exp(mean + deviation * normal)), least), most)


def texts(count: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Return examples of random tokens, with labels on the completions."""
    torch.manual_seed(0)
    examples = []
    for prompt, completion in lengths(count):
        ids = torch.randint(3, vocabulary, (prompt + completion,))
        labels = ids.clone()
        labels[:prompt] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def tokenizer() -> Any:
    """Return a tokenizer that knows how to pad, and nothing else."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = models.WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(known), unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


class Watch:
    """Seconds from the end of step WARM to the end of the last one, and the peak of memory."""

    def __init__(self, device: Device) -> None:
        self.device, self.steps = device, 0
        self.loaded = self.start = self.seconds = self.peak = 0.0

    def begin(self) -> None:
        """Note what the loaded model takes, when training starts."""
        if self.device.is_cuda:
            self.loaded = self.device.allocated()
            torch.cuda.reset_peak_memory_stats(self.device.device)

    def end_step(self) -> None:
        """Start the clock after the first steps."""
        self.steps += 1
        if self.steps == WARM:
            self.device.synchronize()
            self.start = time.perf_counter()

    def end(self) -> None:
        """Stop the clock."""
        self.device.synchronize()
        self.seconds = time.perf_counter() - self.start
        if self.device.is_cuda:
            self.peak = torch.cuda.max_memory_allocated(self.device.device) - self.loaded

    def found(self) -> Row:
        """Return the seconds of a step, and MiB."""
        return {
            "ms": 1000 * self.seconds / (self.steps - WARM),
            "peak_mib": self.device.measured(self.peak / MIB),
        }


def ours(base: nn.Module, examples: list[Row], watch: Watch, batch: int, grouped: bool) -> None:
    """Train with CausalLM in Lightning's Trainer."""
    from lightning.pytorch import Callback, Trainer

    from adaptrank.data import causal_batch
    from adaptrank.data.task import TaskData
    from adaptrank.modules import Adapter, CausalLM
    from adaptrank.parameterizations import LoRA

    class Random(CausalLM):
        def load_backbone(self) -> Any:
            return sharing(base)

    class Texts(TaskData):
        def rows(self, split: Any) -> Any:
            return examples

        def encode(self, rows: Any, split: Any) -> Any:
            return rows

        def collate(self, split: Any) -> Any:
            return partial(causal_batch, pad_id=self.pad_id)

    class Watching(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            watch.begin()

        def on_train_batch_end(self, *args: Any) -> None:
            watch.end_step()

        def on_train_end(self, trainer: Any, module: Any) -> None:
            watch.end()

    data = Texts(batch_size=batch, group_by_length=grouped)
    data.tokenizer = tokenizer()
    module = Random(
        "random",
        adapters=[Adapter([partial(LoRA, rank=RANK)])],
        dtype="bf16",
        optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0),
        warmup=0,
    )
    Trainer(
        accelerator="gpu" if watch.device.is_cuda else "cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Watching()],
    ).fit(module, datamodule=data)


def theirs(
    base: nn.Module, examples: list[Row], watch: Watch, batch: int, more: Sequence[str]
) -> None:
    """Train with HF PEFT in HF's Trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    class Watching(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.end_step()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            watch.end()

    choices = {
        "grouped": {"train_sampling_strategy": "group_by_length"},
        "bf16": {"bf16": True},
        "Liger": {"use_liger_kernel": True},
    }
    settings = {key: value for name in more for key, value in choices[name].items()}
    torch.manual_seed(0)
    model = get_peft_model(
        sharing(base), LoraConfig(r=RANK, lora_alpha=16, target_modules=common.LINEAR)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=RATE,
            use_cpu=not watch.device.is_cuda,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        rows = [{key: value.tolist() for key, value in row.items()} for row in examples]
        Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer(), padding=True),
            callbacks=[Watching()],
        ).train()


@contextmanager
def restored(name: str) -> Iterator[None]:
    """Undo every change of a module's names, and of the forward passes of its classes."""
    module = import_module(name)
    names = dict(vars(module))
    forwards = {value: vars(value)["forward"] for value in names.values() if has_forward(value)}
    try:
        yield
    finally:
        vars(module).update(names)
        for cls, forward in forwards.items():
            cls.forward = forward


def has_forward(value: object) -> bool:
    return isinstance(value, type) and "forward" in vars(value)


def train(way: str, base: nn.Module, examples: list[Row], device: Device, batch: int) -> Row:
    """Train one way, and return what was measured, or how it failed."""
    watch = Watch(device)
    name, *more = way.split(", ")
    try:
        if name == "ours":
            ours(base, examples, watch, batch, bool(more))
        else:
            theirs(base, examples, watch, batch, more)
        return watch.found()
    except Exception as error:
        return {"failed": one_line(error)}
    finally:
        device.release()


def missing(names: Sequence[str]) -> list[str]:
    """Return the modules that cannot be imported."""
    found = []
    for name in names:
        try:
            import_module(name)
        except ImportError:
            found.append(name)
    return found


def measure(size: Size, device: Device, deadline: Deadline, settings: Settings) -> dict[str, Any]:
    """Return the figures of every way, in rounds in which the ways take turns."""
    base = frozen(size, device.device, settings.vocabulary)
    examples = texts(settings.batches * settings.batch, settings.vocabulary)
    runs: dict[str, list[Row]] = {way: [] for way in WAYS[:-1]}
    longest = 0.0
    while len(runs["ours"]) < settings.runs and deadline.allows(longest):
        begin = deadline.used()
        for way in runs:
            runs[way].append(train(way, base, examples, device, settings.batch))
        longest = max(longest, deadline.used() - begin)
    rows = {way: summary(some) for way, some in runs.items()}
    rows[LIGER] = with_liger(len(runs["ours"]), base, examples, device, settings.batch)
    for mine, other in PAIRS:
        if "ms" in rows[mine] and "ms" in rows[other]:
            pairs = zip(runs[mine], runs[other], strict=True)
            rows[mine]["over"] = {other: common.quartiles([a["ms"] / b["ms"] for a, b in pairs])}
    return {
        "size": f"{size.name}, {settings.batches} batches of {settings.batch}",
        "tokens": sum(len(row["input_ids"]) for row in examples) / len(examples),
        "rounds": len(runs["ours"]),
        "rows": rows,
    }


def with_liger(times: int, base: nn.Module, examples: list[Row], device: Device, batch: int) -> Row:
    """Return the figures with Liger's kernels, or why there are none."""
    if missing(["liger_kernel"]):
        return {"failed": "liger_kernel is not installed"}
    with restored(LLAMA):
        return summary([train(LIGER, base, examples, device, batch) for _ in range(times)])


def summary(runs: Sequence[Row]) -> Row:
    """Return the quartiles of the time, and the largest peak, or how a run failed."""
    for run in runs:
        if "failed" in run:
            return run
    peaks = [run["peak_mib"] for run in runs if run["peak_mib"] is not None]
    return {
        "ms": common.quartiles([run["ms"] for run in runs]),
        "peak_mib": max(peaks, default=None),
    }
