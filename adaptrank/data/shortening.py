"""Cut long texts before they are tokenized, so that memory depends on max_length and not on a text.

A text is cut between two words: before a space that has a letter on both sides. Tokenizers split a
text there, or have no token that goes across. Then the tokens on one side do not depend on the
other side. Where a tokenizer has such a token, or a text has no such place, windows of growing size
are tokenized until two of them agree in every token that is kept.
"""

import logging
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from adaptrank.data.segments import Segment, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHARACTERS = 16
"""Characters for each token in the first window. Most languages have 2 to 5."""

SPARE_CHARACTERS = 1024
"""Characters of the first window beyond those."""

SPARE_TOKENS = 64
"""Tokens that a window has beyond those that are kept."""

LARGEST = 2**19
"""Characters of the largest window."""

WORD_BORDER = re.compile(r"[^\W\d_](?= [^\W\d_])")
"""Last letter of a word that another word follows."""

TOKEN_OF_WORDS = re.compile(r"([A-Za-z]|[^\x00-\x7f]) ")
"""Token, its marks of a space replaced by spaces, that goes across the end of a word."""


class Shortener:
    """Shortener of texts. A shortened text has the same first, or last, tokens.

    Args:
        tokenizer: the tokenizer.
        most: number of tokens that are kept of a text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", most: int) -> None:
        self.tokenizer = tokenizer
        self.most = most
        self.first_window = CHARACTERS * most + SPARE_CHARACTERS
        self._splits_words: bool | None = None

    def is_long(self, texts: list[str]) -> bool:
        """Tell whether texts are together too long to be tokenized as they are."""
        return sum(map(len, texts)) > self.first_window

    def head(self, text: str) -> str:
        """Return a beginning of the text that has the same first tokens, and more than `most`."""
        return self._shorten(text, _head, lambda ids: ids[: self.most])

    def tail(self, text: str) -> str:
        """Return an end of the text that has the same last tokens, and more than `most`."""
        return self._shorten(text, _tail, lambda ids: ids[-self.most :])

    def prompt(self, text: str, *, special: bool) -> str:
        """Return an end of the text as `tail` does, with the beginning token of the text."""
        end = self.tail(text)
        return end if len(end) == len(text) else self.opening(text, special) + end

    def segments(self, segments: list[Segment], *, special: bool) -> list[Segment]:
        """Shorten segments so that `cut` keeps the same tokens (see `adaptrank.data.segments`).

        The last segment loses its end, and the text before it loses its beginning. Segments after
        the last one that is trained on are not expected.

        Args:
            segments: the segments of one text.
            special: the tokenizer adds its beginning token. Otherwise it stands in the text.
        """
        if not self.is_long([text for text, _ in segments]):
            return segments
        *context, last = segments
        if not last[1]:
            return segments
        joined = "".join(text for text, _ in context)
        end = self.tail(joined)
        kept = list(_without_beginning(context, len(joined) - len(end)))
        opening = self.opening(joined, special)
        if opening and len(end) < len(joined):
            kept.insert(0, (opening, False))
        return [*kept, (self._head_and_end(last[0]), last[1])]

    def _head_and_end(self, text: str) -> str:
        """Return a beginning of the text, with the special token that ends the text."""
        head = self.head(text)
        if len(head) == len(text):
            return text
        special = (*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens)
        return head + next((token for token in special if text.endswith(token)), "")

    def opening(self, text: str, special: bool) -> str:
        """Return the beginning token with which a text opens, or "" if the tokenizer adds it."""
        bos = getattr(self.tokenizer, "bos_token", None)
        return bos if bos and not special and text.startswith(bos) else ""

    def _shorten(
        self,
        text: str,
        window: Callable[[str, int], tuple[str, bool]],
        keep: Callable[[list[int]], list[int]],
    ) -> str:
        size = self.first_window
        previous: list[int] | None = None
        while size < len(text):
            part, is_border = window(text, size)
            ids = token_ids(self.tokenizer, [part], special=False)[0]
            if len(ids) >= self.most + SPARE_TOKENS:
                kept = keep(ids)
                if kept == previous or (is_border and self._splits_at_words()):
                    return part
                if size >= LARGEST:
                    log.warning(
                        "A text of %d characters has no space between words to be cut at for "
                        "max_length. The tokens at the cut may differ from those of the whole "
                        "text. Shorten such texts.",
                        len(text),
                    )
                    return part
                previous = kept
            # An odd number, so that repeated patterns do not agree by chance.
            size = 2 * size + 1
        return text

    def _splits_at_words(self) -> bool:
        """Tell whether no token goes across the end of a word."""
        if self._splits_words is None:
            tokens = self.tokenizer.get_vocab()
            spaced = (token.replace("Ġ", " ").replace("▁", " ") for token in tokens)
            self._splits_words = not any(map(TOKEN_OF_WORDS.search, spaced))
        return self._splits_words


def _without_beginning(segments: list[Segment], count: int) -> Iterator[Segment]:
    """Yield segments without their first `count` characters."""
    for text, is_trained in segments:
        if count < len(text):
            yield text[count:], is_trained
        count = max(0, count - len(text))


def _head(text: str, size: int) -> tuple[str, bool]:
    """Return a beginning of at most `size` characters, and whether it ends with a word."""
    ends = [match.end() for match in WORD_BORDER.finditer(text, size * 3 // 4, size)]
    return (text[: ends[-1]], True) if ends else (text[:size], False)


def _tail(text: str, size: int) -> tuple[str, bool]:
    """Return an end of at most `size` characters, and whether it begins before a word."""
    start = len(text) - size
    match = WORD_BORDER.search(text, start, start + size // 4)
    return (text[match.end() :], True) if match else (text[start:], False)
