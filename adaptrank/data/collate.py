"""Examples -> batch, as pure functions. Every mask comes from lengths, never from the padding id, which is often the end id."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label that cross entropy leaves out

Example = Mapping[str, Any]
Batch = dict[str, Any]


def pad(
    sequences: Sequence[Tensor], value: int, *, left: bool = False, multiple_of: int = 1
) -> Tensor:
    """Stack B sequences of lengths (L_b,) into (B, L), L = max L_b rounded up to `multiple_of`; the rest holds `value`."""
    width = max((len(s) for s in sequences), default=0)
    width = -(-width // multiple_of) * multiple_of
    out = torch.full((len(sequences), width), value, dtype=torch.long)
    for row, s in zip(out, sequences, strict=True):
        start = width - len(s) if left else 0
        row[start : start + len(s)] = s
    return out


def mask(sequences: Sequence[Tensor], *, left: bool = False, multiple_of: int = 1) -> Tensor:
    """Attention mask (B, L) of what `pad` returns: 1 on the sequences, 0 on the padding."""
    return pad(
        [torch.ones(len(s), dtype=torch.long) for s in sequences],
        0,
        left=left,
        multiple_of=multiple_of,
    )


def causal_batch(examples: Sequence[Example], pad_id: int, *, multiple_of: int = 1) -> Batch:
    """Batch for training: input_ids, attention_mask, labels, each (B, L), right-padded.

    An example has `input_ids` and `labels`, both (L_b,); labels are -100 on the prompt already, and here on the padding.
    """
    ids = [e["input_ids"] for e in examples]
    return {
        "input_ids": pad(ids, pad_id, multiple_of=multiple_of),
        "attention_mask": mask(ids, multiple_of=multiple_of),
        "labels": pad([e["labels"] for e in examples], IGNORED, multiple_of=multiple_of),
    }


def prompt_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Batch for generation: prompt_ids, prompt_mask (B, L), left-padded, so that all prompts end together."""
    ids = [e["prompt_ids"] for e in examples]
    return {"prompt_ids": pad(ids, pad_id, left=True), "prompt_mask": mask(ids, left=True)}


def predict_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """`prompt_batch` with `prompts`, the B texts."""
    return prompt_batch(examples, pad_id) | {"prompts": [e["prompt"] for e in examples]}


def choice_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Every choice of every example as one row, R rows in all.

    Keys: input_ids, attention_mask, labels (R, L); group (R,) the example's index in the batch; characters (R,) length of the
    choice's text; target (B,) index of the right choice within its group. Labels are -100 on the prompt, and no end follows.
    """
    batch = causal_batch([choice for e in examples for choice in e["choices"]], pad_id)
    batch["group"] = torch.tensor(
        [b for b, e in enumerate(examples) for _ in e["choices"]], dtype=torch.long
    )
    batch["characters"] = torch.tensor(
        [c["characters"] for e in examples for c in e["choices"]], dtype=torch.long
    )
    batch["target"] = torch.tensor([e["target"] for e in examples], dtype=torch.long)
    return batch


def validation_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """`causal_batch`, with prompt_ids, prompt_mask and answers where examples have `answer`, and choices where they have those."""
    batch = causal_batch(examples, pad_id)
    if all("answer" in e for e in examples):
        batch |= prompt_batch(examples, pad_id) | {"answers": [e["answer"] for e in examples]}
    if all("choices" in e for e in examples):
        batch["choices"] = choice_batch(examples, pad_id)
    return batch


def class_batch(
    examples: Sequence[Example], pad_id: int, *, pad_type_id: int = 0, multiple_of: int = 1
) -> Batch:
    """Batch for classification: input_ids, attention_mask and, where examples have them, token_type_ids (B, L) and labels (B,).

    Labels are int64, or float32 where the examples' are floats.
    """
    ids = [e["input_ids"] for e in examples]
    batch: Batch = {
        "input_ids": pad(ids, pad_id, multiple_of=multiple_of),
        "attention_mask": mask(ids, multiple_of=multiple_of),
    }
    if all("token_type_ids" in e for e in examples):
        types = [e["token_type_ids"] for e in examples]
        batch["token_type_ids"] = pad(types, pad_type_id, multiple_of=multiple_of)
    if all("label" in e for e in examples):
        labels = [e["label"] for e in examples]
        numbers = any(isinstance(label, float) for label in labels)
        batch["labels"] = torch.tensor(labels, dtype=torch.float32 if numbers else torch.long)
    return batch
