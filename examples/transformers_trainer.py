"""Let ranks move in transformers' own Trainer.

The allocator is one of the Trainer's callbacks, as it is. The checkpoints hold the adapter
only, and a run resumes from them.
"""

from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from adaptrank import adapt, load_adapter, rank_axes
from adaptrank.allocation import ElaLoRA
from adaptrank.parameterizations import LoRA


def tiny_llama() -> LlamaForCausalLM:
    """Return a random Llama. Replace it by a call of `from_pretrained`."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences that count upwards from a random token."""
    starts = torch.randint(32, (count, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + torch.arange(8)) % 32
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    torch.manual_seed(0)
    model = adapt(tiny_llama(), "all-linear", partial(LoRA, rank=4))
    allocator = ElaLoRA(swaps=6, every=5, warmup=10, final=10)
    folder = Path(mkdtemp())
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=20,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples(512),
        callbacks=[allocator],
    )
    trainer.train()
    for event in allocator.events:
        print(f"step {event['step']}: {event['reason']}")
    # A checkpoint is an adapter, too.
    loaded = load_adapter(tiny_llama(), folder / "checkpoint-40")
    sizes = {key: len(axis) for key, axis in rank_axes(loaded).items()}
    print(f"the ranks lie between {min(sizes.values())} and {max(sizes.values())}")


if __name__ == "__main__":
    main()
