"""Tokenize texts whose parts are trained on or not, and shorten them to a number of tokens."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptrank.data.collate import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Segment = tuple[str, bool]
"""A piece of text, and whether it is trained on."""

CHARACTERS_AT_ONCE = 2**22
"""Characters of texts that are tokenized in one call."""


def token_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, special: bool
) -> list[list[int]]:
    """Return the token ids of every text.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        special: let the tokenizer add its beginning token. Its end token is removed.
    """
    ids_of_texts: list[list[int]] = []
    for start, stop in portions(texts):
        encoded = tokenizer(texts[start:stop], add_special_tokens=special, verbose=False)
        ids_of_texts += encoded["input_ids"]
    if not special:
        return ids_of_texts
    end = tokenizer.eos_token_id
    return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in ids_of_texts]


def portions(*columns: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of texts to tokenize together.

    A tokenizer needs a hundred bytes and more for each character, until its call returns.

    Args:
        columns: lists of texts, all of one length.
    """
    start = characters = 0
    for k, texts in enumerate(zip(*columns, strict=True)):
        size = sum(map(len, texts))
        if k > start and characters + size > CHARACTERS_AT_ONCE:
            yield start, k
            start, characters = k, 0
        characters += size
    stop = len(columns[0])
    if start < stop:
        yield start, stop


def encode_segments(
    tokenizer: "PreTrainedTokenizerBase", rows: list[list[Segment]], *, special: bool
) -> list[tuple[list[int], list[int]]]:
    """Return token ids and labels of texts made of segments.

    Labels are -100 on segments that are not trained on. A segment is tokenized together with the
    text before it, unless that would change the tokens before it. The prompt therefore has the ids
    that generation sees, and the rest has the ids of the whole text where the border allows it.

    Args:
        tokenizer: the tokenizer.
        rows: segments of each text.
        special: as in `token_ids`.
    """
    encoded: list[tuple[list[int], list[int]]] = [([], []) for _ in rows]
    texts = ["" for _ in rows]
    most_segments = max((len(row) for row in rows), default=0)
    for k in range(most_segments):
        indices = [i for i, row in enumerate(rows) if k < len(row)]
        for i in indices:
            texts[i] += rows[i][k][0]
        joint = token_ids(tokenizer, [texts[i] for i in indices], special=special)
        for i, joint_ids in zip(indices, joint, strict=True):
            ids, labels = encoded[i]
            piece, is_trained = rows[i][k]
            if joint_ids[: len(ids)] == ids:
                new_ids = joint_ids[len(ids) :]
            else:
                new_ids = token_ids(tokenizer, [piece], special=False)[0]
            ids += new_ids
            labels += new_ids if is_trained else [IGNORED] * len(new_ids)
    return encoded


def cut(
    ids: list[int], labels: list[int], max_length: int, bos: int | None
) -> tuple[list[int], list[int], str]:
    """Shorten to max_length tokens, from the left up to the last completion, then from the right.

    A beginning-of-sequence token stays first.

    Args:
        ids: token ids.
        labels: their labels, -100 where not trained on.
        max_length: most tokens to keep.
        bos: id of the beginning-of-sequence token, or None.

    Returns:
        The ids, the labels, and the part that was shortened: "", "prompt" or "completion".
    """
    excess = len(ids) - max_length
    if excess <= 0:
        return ids, labels, ""
    # One token stays before the completion, which is predicted from it.
    removable = _start_of_last_completion(labels) - 1
    removed = max(0, min(excess, removable))
    kept = 1 if removed and ids[0] == bos else 0
    ids = ids[:kept] + ids[removed + kept :]
    labels = labels[:kept] + labels[removed + kept :]
    part = "completion" if removed < excess else "prompt"
    return ids[:max_length], labels[:max_length], part


def _start_of_last_completion(labels: list[int]) -> int:
    """Return the position where the last trained segment begins, or the length without one."""
    for position in reversed(range(len(labels))):
        is_trained = labels[position] != IGNORED
        is_first = position == 0 or labels[position - 1] == IGNORED
        if is_trained and is_first:
            return position
    return len(labels)


def as_int32(ids: list[int]) -> Tensor:
    """Return ids as an int32 tensor, half the memory of int64. Batches are int64 again."""
    return torch.tensor(ids, dtype=torch.int32)


def added_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the ids of tokens beside the text: special tokens, and those that were added."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset([*added, *tokenizer.all_special_ids])
