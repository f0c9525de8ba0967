"""Plain text as examples: all of its tokens are trained on, in blocks of a bounded length."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError
from adaptrank.data.collate import IGNORED
from adaptrank.data.columns import read_fields
from adaptrank.data.segments import as_int32, token_ids
from adaptrank.data.sources import Source
from adaptrank.data.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


def document_rows(table: Table, source: Source, *, complete: bool = True) -> list[dict[str, Any]]:
    """Return rows with `text`.

    Args:
        table: the table.
        source: the source, which may say how to make `text`.
        complete: False for prediction, for which a text has no prompt.

    Raises:
        UserError: if a text is missing, or if prompts are asked for.
    """
    if not complete:
        raise UserError(
            f"{source.path!r} holds plain text, which has no prompt to complete. Give `predict` a "
            'source of prompts, or make them, as in prompt: "{text}".'
        )
    return read_fields(table, source, ("text",), ("text",))


def blocks(ids: Ids, max_length: int) -> Iterator[tuple[Ids, Ids]]:
    """Yield (token ids, labels) of the blocks of a document.

    A block begins with the last token of the block before it, which is context there. So each token
    of the document but the first is predicted once.

    Args:
        ids: token ids of the document.
        max_length: most tokens of a block, 2 or more.
    """
    start = 0
    while True:
        block = ids[start : start + max_length]
        yield block, [IGNORED, *block[1:]]
        start += max_length - 1
        if start >= len(ids) - 1:
            return


def encode_documents(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_length: int
) -> list[dict[str, Any]]:
    """Return examples with `input_ids` and `labels`, each (L,): the blocks of every text.

    The tokenizer's end token stands after a text, and its beginning token before it where it adds
    one.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        max_length: most tokens of a block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for ids in token_ids(tokenizer, texts, special=True):
        for block, labels in blocks(ids + end, max_length):
            examples.append({"input_ids": as_int32(block), "labels": as_int32(labels)})
    return examples


def check_scores(examples: list[dict[str, Any]], split: str) -> None:
    """Raise if examples that stand beside plain text have an answer or choices.

    Such scores are those of batches in which every example has them.

    Raises:
        UserError: naming the split.
    """
    if any("answer" in example or "choices" in example for example in examples):
        raise UserError(
            f"The {split} rows mix plain text with prompts that have an answer or choices, which "
            "are scored apart. Set `validation` and `test` to one of the two."
        )
