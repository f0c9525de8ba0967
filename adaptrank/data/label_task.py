"""The task of naming a class, or a number, for a text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.collate import Batch, class_batch
from adaptrank.data.incremental_data import IncrementalData
from adaptrank.data.segments import as_int32, portions
from adaptrank.data.shortening import Shortener
from adaptrank.data.task import Row, Split


class LabelTask(IncrementalData):
    """Texts to classify.

    Rows have `text`, perhaps `text_pair`, and `label`, the index of the class. Either every row of
    a split has `text_pair` or none has. Where a text has no second one, its pair is "", and it is
    encoded as a single text. A label that is a float is a number to predict, and stays one.
    Batches are `class_batch`.
    """

    def conventions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if pad_token := getattr(self.tokenizer, "pad_token", None):
            found["pad_token"] = self.token_table(pad_token)
        return found | super().conventions()

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        return partial(
            class_batch,
            pad_id=self.pad_id,
            pad_type_id=getattr(self.tokenizer, "pad_token_type_id", 0),
        )

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        _check_all_or_no_pairs(rows, split)
        examples: list[Row] = [{} for _ in rows]
        truncated = 0
        for is_paired in (False, True):
            indices = [i for i, row in enumerate(rows) if bool(row.get("text_pair")) is is_paired]
            if not indices:
                continue
            encoded, count = self._tokenize([rows[i] for i in indices], is_paired)
            truncated += count
            for i, example in zip(indices, encoded, strict=True):
                if "label" in rows[i]:
                    example["label"] = self.label_of_model(rows[i]["label"])
                examples[i] = example
        self.report_cuts(split, len(rows), texts_cut=truncated)
        return examples

    def _tokenize(self, rows: list[Row], is_paired: bool) -> tuple[list[Row], int]:
        """Tokenize single texts, or pairs. Return the examples, and how many were cut."""
        assert self.tokenizer is not None
        options: dict[str, Any] = {
            "truncation": True,
            "max_length": self.max_length,
            "verbose": False,
        }
        texts = self._shortened([row["text"] for row in rows])
        columns = [texts]
        if is_paired:
            columns.append(self._shortened([row["text_pair"] for row in rows]))
        examples = []
        truncated = 0
        for start, stop in portions(*columns):
            encoded = self.tokenizer(*(column[start:stop] for column in columns), **options)
            fields = [field for field in ("input_ids", "token_type_ids") if field in encoded]
            for k in range(stop - start):
                examples.append({field: as_int32(encoded[field][k]) for field in fields})
            truncated += sum(bool(encoding.overflowing) for encoding in encoded.encodings or [])
        return examples, truncated

    def _shortened(self, texts: list[str]) -> list[str]:
        """Shorten texts so that truncation keeps the same tokens."""
        assert self.tokenizer is not None
        shortener = Shortener(self.tokenizer, self.max_length)
        shorten = shortener.tail if self.tokenizer.truncation_side == "left" else shortener.head
        return [shorten(text) for text in texts]


def _check_all_or_no_pairs(rows: list[Row], split: Split) -> None:
    """Raise if some rows have `text_pair` and some have not."""
    single = [row for row in rows if "text_pair" not in row]
    if 0 < len(single) < len(rows):
        raise UserError(
            f"{len(single)} of {len(rows)} {split} rows have no `text_pair`, the first of them "
            f'{single[0]["text"][:60]!r}. Give every row one, "" where there is no second text.'
        )
