"""Make batches of examples, as pure functions.

Every mask is computed from lengths, and never from the padding id, which is often the end id.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserError

IGNORED = -100
"""Label that the cross entropy leaves out."""

Example = Mapping[str, Any]
Batch = dict[str, Any]


def pad(
    sequences: Sequence[Tensor], value: int, *, left: bool = False, multiple_of: int = 1
) -> Tensor:
    """Stack B sequences of lengths (L_b,) into one tensor (B, L), padded with `value`.

    L is the largest L_b, rounded up to `multiple_of`.
    """
    longest = max((len(sequence) for sequence in sequences), default=0)
    width = -(-longest // multiple_of) * multiple_of
    padded = torch.full((len(sequences), width), value, dtype=torch.long)
    for row, sequence in zip(padded, sequences, strict=True):
        start = width - len(sequence) if left else 0
        row[start : start + len(sequence)] = sequence
    return padded


def mask(sequences: Sequence[Tensor], *, left: bool = False, multiple_of: int = 1) -> Tensor:
    """Return the attention mask (B, L) for `pad`: 1 on the sequences, 0 on the padding."""
    ones = [torch.ones(len(sequence), dtype=torch.long) for sequence in sequences]
    return pad(ones, 0, left=left, multiple_of=multiple_of)


def causal_batch(examples: Sequence[Example], pad_id: int, *, multiple_of: int = 1) -> Batch:
    """Return a batch for training: input_ids, attention_mask, labels, each (B, L), right-padded.

    An example has `input_ids` and `labels`, both (L_b,). Its labels are -100 on the prompt. The
    batch's labels are also -100 on the padding.
    """
    ids = [example["input_ids"] for example in examples]
    labels = [example["labels"] for example in examples]
    return {
        "input_ids": pad(ids, pad_id, multiple_of=multiple_of),
        "attention_mask": mask(ids, multiple_of=multiple_of),
        "labels": pad(labels, IGNORED, multiple_of=multiple_of),
    }


def prompt_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Return a batch for generation: prompt_ids and prompt_mask, each (B, L).

    Padding is on the left, so that all prompts end together.
    """
    ids = [example["prompt_ids"] for example in examples]
    return {"prompt_ids": pad(ids, pad_id, left=True), "prompt_mask": mask(ids, left=True)}


def predict_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Return `prompt_batch` with `prompts`, the B texts."""
    return prompt_batch(examples, pad_id) | {"prompts": [example["prompt"] for example in examples]}


def choice_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Return a batch with every choice of every example as one row, R rows in all.

    The keys are those of `causal_batch`, each (R, L), and

    - group: (R,) index of the row's example in the batch.
    - characters: (R,) length of the choice's text.
    - target: (B,) index of the correct choice within its group.

    Labels are -100 on the prompt, and no end token follows a choice.
    """
    choices = []
    groups = []
    for index, example in enumerate(examples):
        choices += example["choices"]
        groups += [index] * len(example["choices"])
    batch = causal_batch(choices, pad_id)
    characters = [choice["characters"] for choice in choices]
    targets = [example["target"] for example in examples]
    batch["group"] = torch.tensor(groups, dtype=torch.long)
    batch["characters"] = torch.tensor(characters, dtype=torch.long)
    batch["target"] = torch.tensor(targets, dtype=torch.long)
    return batch


def validation_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Return `causal_batch` with prompts and answers, and with choices, where examples have them.

    If all examples have `answer`, the keys of `prompt_batch` and `answers` are added. If all have
    `choices`, the key `choices` holds a `choice_batch`.
    """
    batch = causal_batch(examples, pad_id)
    if all("answer" in example for example in examples):
        batch |= prompt_batch(examples, pad_id)
        batch["answers"] = [example["answer"] for example in examples]
    if all("choices" in example for example in examples):
        batch["choices"] = choice_batch(examples, pad_id)
    return batch


def class_batch(
    examples: Sequence[Example], pad_id: int, *, pad_type_id: int = 0, multiple_of: int = 1
) -> Batch:
    """Return a batch for classification: input_ids and attention_mask, each (B, L).

    Where examples have them, token_type_ids (B, L) and labels are added, see `label_entry`.
    """
    ids = [example["input_ids"] for example in examples]
    batch: Batch = {
        "input_ids": pad(ids, pad_id, multiple_of=multiple_of),
        "attention_mask": mask(ids, multiple_of=multiple_of),
    }
    if all("token_type_ids" in example for example in examples):
        types = [example["token_type_ids"] for example in examples]
        batch["token_type_ids"] = pad(types, pad_type_id, multiple_of=multiple_of)
    return batch | label_entry(examples)


def image_batch(examples: Sequence[Example]) -> Batch:
    """Return a batch of images: pixel_values (B, C, H, W), and labels where examples have them.

    Raises:
        UserError: if images differ in their size.
    """
    pixels = [example["pixel_values"] for example in examples]
    shapes = sorted({tuple(image.shape) for image in pixels})
    if len(shapes) > 1:
        raise UserError(
            f"Images of a batch have the sizes {shapes}: the image processor leaves them as they "
            "are. Give it a size, in preprocessor_config.json of the backbone."
        )
    return {"pixel_values": torch.stack(pixels)} | label_entry(examples)


def label_entry(examples: Sequence[Example]) -> Batch:
    """Return {labels: tensor} if all examples have a `label`, else {}.

    The shape is (B,), or (B, labels) where a label is a list. The dtype is int64, or float32 if a
    label is a float.
    """
    if not all("label" in example for example in examples):
        return {}
    labels = [example["label"] for example in examples]
    has_float = any(_has_float(label) for label in labels)
    return {"labels": torch.tensor(labels, dtype=torch.float32 if has_float else torch.long)}


def _has_float(label: Any) -> bool:
    """Tell whether a label, or a member of it, is a float."""
    members = label if isinstance(label, list) else [label]
    return any(isinstance(member, float) for member in members)
