"""The task of choosing the right one of several texts."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from adaptrank.data.collate import IGNORED, Batch, mask, pad
from adaptrank.data.segments import portions
from adaptrank.data.shortening import Shortener
from adaptrank.data.task import Row, Split, TaskData

PIECE_FIELDS = ("input_ids", "token_type_ids")
"""Fields of the tokenizer that an example keeps."""


class ChoiceTask(TaskData):
    """Questions, each with its own choices, of which one is right.

    Rows have `question`, `choices` (a list of texts) and `label`, the index of the right choice,
    and may have `context`. The model reads each choice by itself, as a pair of texts: the question
    and the choice, or with a context the context, and the question with the choice. The numbers of
    choices may differ. Batches are `multiple_choice_batch`.

    Args:
        kwargs: those of `TaskData`. `max_length` is that of a pair. The longer text of a pair is
            cut first.
    """

    @property
    def num_choices(self) -> int | None:
        """Most choices of a question, known after `setup`."""
        examples = itertools.chain.from_iterable(self.encoded.values())
        return max((len(example["lengths"]) for example in examples), default=None)

    def conventions(self) -> dict[str, Any]:
        padding = getattr(self.tokenizer, "pad_token", None)
        return {"pad_token": self.token_table(padding)} if padding else {}

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        return partial(
            multiple_choice_batch,
            pad_id=self.pad_id,
            pad_type_id=getattr(self.tokenizer, "pad_token_type_id", 0),
        )

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        firsts: list[str] = []
        seconds: list[str] = []
        for row in rows:
            for choice in row["choices"]:
                first, second = pair_of(row, choice)
                firsts.append(first)
                seconds.append(second)
        encoded, is_cut = self._encode_pairs(firsts, seconds)
        examples: list[Row] = []
        cut_rows = start = 0
        for row in rows:
            stop = start + len(row["choices"])
            cut_rows += any(is_cut[start:stop])
            examples.append(self._example(row, encoded[start:stop], split))
            start = stop
        self.report_cuts(split, len(rows), questions_with_a_text_that_is_cut=cut_rows)
        return examples

    def _encode_pairs(
        self, firsts: list[str], seconds: list[str]
    ) -> tuple[list[dict[str, list[int]]], list[bool]]:
        """Tokenize pairs. Return the fields of each pair, and whether it was cut."""
        assert self.tokenizer is not None
        shortener = Shortener(self.tokenizer, self.max_length)
        columns = [
            [shortener.head(text) for text in firsts],
            [shortener.head(text) for text in seconds],
        ]
        encoded: list[dict[str, list[int]]] = []
        is_cut: list[bool] = []
        for start, stop in portions(*columns):
            batch = self.tokenizer(
                *(column[start:stop] for column in columns),
                truncation=True,
                max_length=self.max_length,
                verbose=False,
            )
            fields = [field for field in PIECE_FIELDS if field in batch]
            for k in range(stop - start):
                encoded.append({field: batch[field][k] for field in fields})
            # Only fast tokenizers say what they cut.
            whole = [False] * (stop - start)
            is_cut += [bool(one.overflowing) for one in batch.encodings or []] or whole
        return encoded, is_cut

    def _example(self, row: Row, choices: list[dict[str, list[int]]], split: Split) -> Row:
        """Return one example: the pieces of all choices in one row, and the length of each."""
        example: Row = {}
        for field in choices[0]:
            pieces = [piece for choice in choices for piece in choice[field]]
            example[field] = torch.tensor(pieces, dtype=torch.int32)
        lengths = [len(choice["input_ids"]) for choice in choices]
        example["lengths"] = torch.tensor(lengths, dtype=torch.int32)
        if "label" in row:
            example["label"] = row["label"]
        if split != "train":
            example["choices"] = row["choices"]
        return example


def pair_of(row: Row, choice: str) -> tuple[str, str]:
    """Return the two texts that the model reads for a choice."""
    question = row["question"]
    context = row.get("context", "")
    if not context:
        return question, choice
    return context, f"{question} {choice}" if question else choice


def multiple_choice_batch(examples: Sequence[Row], pad_id: int, *, pad_type_id: int = 0) -> Batch:
    """Return a batch for multiple choice. C is the largest number of choices in it.

    - input_ids, attention_mask and, where examples have them, token_type_ids: (B, C, L).
    - choice_mask: (B, C), 1 on choices, 0 where an example has fewer than C.
    - labels: (B,) index of the right choice, where examples have one.
    - choices: the B lists of texts, where examples have them.
    """
    counts = [len(example["lengths"]) for example in examples]
    most = max(counts, default=0)
    padding = {"input_ids": pad_id, "token_type_ids": pad_type_id}
    batch: Batch = {}
    for field, value in padding.items():
        if not all(field in example for example in examples):
            continue
        rows = []
        for example in examples:
            pieces = list(example[field].split(example["lengths"].tolist()))
            rows += pieces + [pieces[0][:0]] * (most - len(pieces))
        batch[field] = pad(rows, value).view(len(examples), most, -1)
        if field == "input_ids":
            batch["attention_mask"] = mask(rows).view(len(examples), most, -1)
    batch["choice_mask"] = mask([torch.ones(count) for count in counts])
    if all("label" in example for example in examples):
        batch["labels"] = torch.tensor([example["label"] for example in examples])
    elif any("label" in example for example in examples):
        labels = [example.get("label", IGNORED) for example in examples]
        batch["labels"] = torch.tensor(labels)
    if all("choices" in example for example in examples):
        batch["choices"] = [example["choices"] for example in examples]
    return batch
