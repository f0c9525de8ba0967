"""The task of naming a class for each word of a sentence."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.collate import IGNORED, Batch, mask, pad
from adaptrank.data.labelled_data import LabelledData
from adaptrank.data.segments import as_int32, portions
from adaptrank.data.task import Row, Split

log = logging.getLogger(__name__)

NO_PIECE = -1
"""Position of the first piece of a word that has none."""


class TokenTask(LabelledData):
    """Sentences whose words are tagged.

    Rows have `tokens`, a list of words, and `tags`, the index of the class of each word, -100 for a
    word without a tag. A word may become several pieces of the tokenizer. Its first piece carries
    its label, and its prediction is read there. Batches are `token_batch`.

    Words beyond `max_length` pieces have no prediction. The log says how many there are. A sentence
    is never split.

    Args:
        label_all_pieces: train on all pieces of a word. Evaluation and prediction read the first
            piece in any case.
        kwargs: those of `TaskData`.
    """

    def __init__(self, *, label_all_pieces: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check_examples_per_class(False)
        self.label_all_pieces = label_all_pieces

    def conventions(self) -> dict[str, Any]:
        padding = getattr(self.tokenizer, "pad_token", None)
        found = {"pad_token": self.token_table(padding)} if padding else {}
        return found | super().conventions()

    def training_labels(self) -> Iterable[Any]:
        return (example["labels"] for example in self.examples("train"))

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        return partial(
            token_batch,
            pad_id=self.pad_id,
            pad_type_id=getattr(self.tokenizer, "pad_token_type_id", 0),
            with_words=split != "train",
        )

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        assert self.tokenizer is not None
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{type(self.tokenizer).__name__} does not say which pieces belong to a word, and "
                "tags need it. Save the model with a fast tokenizer (tokenizer.json)."
            )
        between = " " if needs_spaces(self.tokenizer) else ""
        sentences = [_spaced(row["tokens"], between) for row in rows]
        examples: list[Row] = []
        cut_sentences = lost_words = 0
        for start, stop in portions([" ".join(sentence) for sentence in sentences]):
            encoded = self.tokenizer(
                sentences[start:stop],
                is_split_into_words=True,
                truncation=True,
                max_length=self.max_length,
                verbose=False,
            )
            for k, row in enumerate(rows[start:stop]):
                example = self._example(row, encoded, k, split)
                cut_sentences += bool(encoded.encodings[k].overflowing)
                lost_words += int((example["first_pieces"] == NO_PIECE).sum())
                examples.append(example)
        self.report_cuts(split, len(rows), sentences_cut=cut_sentences)
        if lost_words:
            log.warning(
                "%d words of the %s sentences have no piece: they are beyond max_length, or the "
                "tokenizer drops their characters. They are not trained on, not scored and not "
                "predicted. Raise max_length, or split long sentences.",
                lost_words,
                split,
            )
        return examples

    def _example(self, row: Row, encoded: Any, k: int, split: Split) -> Row:
        """Return one example: its pieces, where its words begin, and its labels or its words."""
        words = encoded.word_ids(k)
        first = first_pieces(words, len(row["tokens"]))
        fields = [field for field in ("input_ids", "token_type_ids") if field in encoded]
        example: Row = {field: as_int32(encoded[field][k]) for field in fields}
        example["first_pieces"] = as_int32(first)
        if "tags" in row:
            tags = [self._tag_of_model(tag) for tag in row["tags"]]
            example["labels"] = as_int32(piece_labels(words, tags, self.label_all_pieces))
            example["tags"] = as_int32(tags)
        if split != "train":
            example["tokens"] = row["tokens"]
        return example

    def _tag_of_model(self, tag: int) -> int:
        """Return the model's index of the class of a word. A word without a tag has none."""
        return tag if tag == IGNORED else int(self.label_of_model(tag))


def needs_spaces(tokenizer: Any) -> bool:
    """Tell whether a word within a sentence has to begin with a space for this tokenizer.

    Tokenizers of bytes (GPT-2, RoBERTa) have other pieces for a word after a space. Given a list of
    words, they put no space between them, and the pieces would be those of one long word.
    """
    words = ["to", "be"]
    joined = tokenizer(" ".join(words))["input_ids"]
    if tokenizer(words, is_split_into_words=True)["input_ids"] == joined:
        return False
    return bool(tokenizer(_spaced(words, " "), is_split_into_words=True)["input_ids"] == joined)


def _spaced(words: Sequence[str], between: str) -> list[str]:
    """Return words, all but the first with a space before them if `between` is one."""
    if not between:
        return list(words)
    return [*words[:1], *(between + word for word in islice(words, 1, None))]


def first_pieces(words: Sequence[int | None], count: int) -> list[int]:
    """Return the position of the first piece of each word, or -1 for a word without a piece.

    Args:
        words: the number of the word of each piece, None for a piece that the tokenizer added.
        count: number of words.
    """
    first = [NO_PIECE] * count
    for position, word in enumerate(words):
        if word is not None and first[word] == NO_PIECE:
            first[word] = position
    return first


def piece_labels(
    words: Sequence[int | None], tags: Sequence[int], label_all_pieces: bool
) -> list[int]:
    """Return the label of each piece: the tag of its word, or -100.

    Args:
        words: the number of the word of each piece, None for a piece that the tokenizer added.
        tags: the tag of each word.
        label_all_pieces: label all pieces of a word, and not only its first one.
    """
    labels = []
    previous = None
    for word in words:
        is_labelled = word is not None and (label_all_pieces or word != previous)
        labels.append(tags[word] if word is not None and is_labelled else IGNORED)
        previous = word
    return labels


def token_batch(
    examples: Sequence[Row], pad_id: int, *, pad_type_id: int = 0, with_words: bool = False
) -> Batch:
    """Return a batch for the classification of words: input_ids and attention_mask, each (B, L).

    Where examples have them, token_type_ids (B, L) and labels (B, L) are added. Labels are -100 on
    padding and on pieces without a label. With `with_words` are added

    - first_pieces: (B, W) position of the first piece of each word. -1 for a word without a piece,
      and on padding.
    - tags: (B, W) class of each word, where examples have one. -100 on padding.
    - tokens: the B lists of words, where examples have them.
    """
    ids = [example["input_ids"] for example in examples]
    batch: Batch = {"input_ids": pad(ids, pad_id), "attention_mask": mask(ids)}
    padding = {"token_type_ids": pad_type_id, "labels": IGNORED}
    if with_words:
        padding |= {"first_pieces": NO_PIECE, "tags": IGNORED}
    for key, value in padding.items():
        if all(key in example for example in examples):
            batch[key] = pad([example[key] for example in examples], value)
    if with_words and all("tokens" in example for example in examples):
        batch["tokens"] = [example["tokens"] for example in examples]
    return batch
