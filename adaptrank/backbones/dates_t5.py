"""A small T5 that rewrites dates in digits, trained on this machine, and its tokenizer.

It is an encoder-decoder without a download: an adapter then learns dates in words.
"""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank.backbones.made_once import make_once
from adaptrank.backbones.silence import silenced

if TYPE_CHECKING:
    from torch import Tensor

NAME = "adaptrank/t5-dates"
"""Name of the model, as a backbone."""

FORMS = ("{day}/{month}/{year}", "{day}.{month}.{year}", "{year} {month} {day}")
"""Forms of the dates that it was trained on. It rewrites each as year-month-day."""

STEPS, BATCH_SIZE, LEARNING_RATE = 600, 64, 3e-3

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def make_dates_t5(folder: Path) -> None:
    """Train the model, unless the folder has it already.

    Raises:
        OSError: if the folder cannot be written.
    """
    make_once(
        folder,
        _write,
        f"Training {NAME} on dates in digits into {folder}, once. This takes half a minute.",
        f"{NAME} could not be made in {folder}",
    )


def _write(folder: Path) -> None:
    import torch

    tokenizer = character_tokenizer()
    # A first run must draw the same random numbers as the runs after it.
    with silenced(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(len(tokenizer))
        _train(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def build(vocabulary: int) -> Any:
    """Return a T5 of random weights: two blocks in the encoder, two in the decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config_class: Any = T5Config
    config = config_class(
        vocab_size=vocabulary,
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def character_tokenizer() -> Any:
    """Return a tokenizer whose tokens are single printable ASCII characters, with an end token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
    vocabulary = {token: k for k, token in enumerate([PAD, END, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}",
        pair=f"$A {END} $B {END}",
        special_tokens=[(END, vocabulary[END])],
    )
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _train(model: Any, tokenizer: Any) -> None:
    """Train a model on dates in digits."""
    import torch

    generator = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        pairs = [_draw(generator) for _ in range(BATCH_SIZE)]
        sources, targets = (list(texts) for texts in zip(*pairs, strict=True))
        batch = tokenizer(sources, padding=True, return_tensors="pt")
        labels: Tensor = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _draw(generator: random.Random) -> tuple[str, str]:
    """Return a date in digits, and the same as year-month-day."""
    year = generator.randrange(1900, 2100)
    month, day = generator.randrange(1, 13), generator.randrange(1, 29)
    source = generator.choice(FORMS).format(year=year, month=month, day=day)
    return source, f"{year}-{month:02d}-{day:02d}"
