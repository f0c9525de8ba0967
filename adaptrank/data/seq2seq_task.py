"""The task of rewriting a source text as a target text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.data.collate import IGNORED, Batch, mask, pad
from adaptrank.data.prompts import gaps_of
from adaptrank.data.segments import as_int32, portions
from adaptrank.data.shortening import Shortener
from adaptrank.data.task import Row, Split, TaskData, check_size


class Seq2SeqTask(TaskData):
    """Texts to rewrite, for models with an encoder and a decoder.

    Rows have `source` and `target`. The tokenizer's end token follows every target, also where a
    target was cut. Batches are `seq2seq_batch`.

    Args:
        prefix: text before every source, such as "summarize: ". The adapter records it.
        max_target_length: most tokens of a target, the end token included. Longer ones are cut,
            and counted in `truncated`.
        kwargs: those of `TaskData`. `max_length` is that of the source.

    Raises:
        UserError: if `max_target_length` is no positive integer. In `setup`, if a source has no
            token.
    """

    def __init__(self, *, prefix: str = "", max_target_length: int = 128, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_size("max_target_length", max_target_length, 1, "leaves no token to train on")
        self.prefix = prefix
        self.max_target_length = max_target_length
        self._first_source: str | None = None

    @property
    def source_template(self) -> str | None:
        """Format string over columns that makes the sources, or None if rows have whole sources."""
        return None

    @property
    def prompt_template(self) -> str | None:
        """Format string of what the encoder reads, or None if rows hold it as it is."""
        template = self.source_template
        if template is None or not gaps_of(template):
            template = "{source}" if self.prefix else None
        if template is None:
            return None
        return escaped(self.prefix) + template

    @property
    def prompt_columns(self) -> list[dict[str, str | bool]]:
        """How the training sources make what the encoder reads, as in `CompletionTask`."""
        return []

    @property
    def example_prompt(self) -> str | None:
        """A source of the data with its prefix, to try the model with."""
        return self._first_source

    def conventions(self) -> dict[str, Any]:
        assert self.tokenizer is not None
        found: dict[str, Any] = {}
        if self.prompt_template is not None:
            found["prompt"] = self.prompt_template
        if self.prompt_columns:
            found["columns"] = self.prompt_columns
        if end := self.tokenizer.eos_token:
            found["stop_tokens"] = self.token_table(end)
        if padding := self.tokenizer.pad_token:
            found["pad_token"] = self.token_table(padding)
        return found

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        return partial(seq2seq_batch, pad_id=self.pad_id)

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        sources = [self.prefix + row["source"] for row in rows]
        if self._first_source is None and sources:
            self._first_source = sources[0]
        ids, cut_sources = self._encode_texts(sources, self.max_length, "text")
        empty = [k for k, tokens in enumerate(ids) if not len(tokens)]
        if empty:
            raise UserError(
                f"Row {empty[0]} of the {split} rows has an empty source, and there is nothing to "
                f"read ({len(empty)} of {len(rows)} rows). Remove or fill such rows."
            )
        examples: list[Row] = [{"input_ids": tokens} for tokens in ids]
        cut_targets = 0
        if all("target" in row for row in rows):
            targets = [row["target"] for row in rows]
            labels, cut_targets = self._encode_texts(targets, self.max_target_length, "text_target")
            for example, label in zip(examples, labels, strict=True):
                example["target_ids"] = label
        self.report_cuts(split, len(rows), sources_cut=cut_sources, targets_cut=cut_targets)
        if split != "train":
            for example, source, row in zip(examples, sources, rows, strict=True):
                example["source"] = source
                if "target" in row:
                    example["target"] = row["target"]
        return examples

    def _encode_texts(self, texts: list[str], most: int, side: str) -> tuple[list[Tensor], int]:
        """Tokenize texts. Return their ids, each (L,), and how many texts were cut.

        Args:
            texts: the texts.
            most: most tokens of a text.
            side: "text" for sources, "text_target" for targets. Some tokenizers have a language for
                each.
        """
        assert self.tokenizer is not None
        tokenizer: Any = self.tokenizer
        shortener = Shortener(tokenizer, most)
        shortened = [shortener.head(text) for text in texts]
        encoded: list[list[int]] = []
        for start, stop in portions(shortened):
            batch = {side: shortened[start:stop]}
            encoded += tokenizer(**batch, verbose=False)["input_ids"]
        add_end = side == "text_target"
        lengths = [len(ids) + int(add_end and self._lacks_end(ids)) for ids in encoded]
        too_long = [k for k, length in enumerate(lengths) if length > most]
        if too_long:
            missing = int(add_end and self._lacks_end(encoded[too_long[0]]))
            batch = {side: [shortened[k] for k in too_long]}
            # The tokenizer itself keeps its special tokens at the end.
            cut = tokenizer(**batch, truncation=True, max_length=most - missing, verbose=False)
            for k, ids in zip(too_long, cut["input_ids"], strict=True):
                encoded[k] = ids
        if add_end:
            end = tokenizer.eos_token_id
            encoded = [[*ids, end] if self._lacks_end(ids) else ids for ids in encoded]
        return [as_int32(ids) for ids in encoded], len(too_long)

    def _lacks_end(self, ids: list[int]) -> bool:
        """Tell whether the tokenizer has an end token and put no special token at the end."""
        tokenizer = self.tokenizer
        assert tokenizer is not None
        if tokenizer.eos_token_id is None:
            return False
        return not ids or ids[-1] not in tokenizer.all_special_ids


def escaped(text: str) -> str:
    """Return a text as a part of a format string."""
    return text.replace("{", "{{").replace("}", "}}")


def seq2seq_batch(examples: Sequence[Row], pad_id: int) -> Batch:
    """Return a batch for an encoder and a decoder, padded on the right.

    - input_ids and attention_mask: (B, L), the sources.
    - labels: (B, T), the targets with their end token, -100 on padding, where examples have them.
    - sources, targets: the B texts, where examples have them.
    """
    ids = [example["input_ids"] for example in examples]
    batch: Batch = {"input_ids": pad(ids, pad_id), "attention_mask": mask(ids)}
    if all("target_ids" in example for example in examples):
        batch["labels"] = pad([example["target_ids"] for example in examples], IGNORED)
    for key in ("source", "target"):
        if all(key in example for example in examples):
            batch[f"{key}s"] = [example[key] for example in examples]
    return batch
