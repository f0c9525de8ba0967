"""Shorten conversations by whole turns, so that system prompt and role lines stay."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptrank.data.chat_conversation import Conversation
from adaptrank.data.collate import IGNORED
from adaptrank.data.segments import Segment, encode_segments, token_ids
from adaptrank.data.shortening import Shortener

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "?"
"""Question in whose place the room for a question is measured."""

ROUNDS = 8
"""Most corrections of a shortened question, whose tokens depend on the text around it."""

Ids = list[int]


@dataclass(frozen=True)
class Fitted:
    """A conversation of at most max_length tokens.

    Args:
        ids: token ids, or None if not even the system prompt and the role lines fit.
        labels: their labels, -100 where not trained on.
        dropped_turns: number of turns that were left out.
        question_cut: whether the last question lost its beginning.
        reply_cut: whether the last reply lost its end.
    """

    ids: Ids | None
    labels: Ids
    dropped_turns: int = 0
    question_cut: bool = False
    reply_cut: bool = False


class TurnDropper:
    """Shortener of conversations.

    The first exchanges are left out, as many as needed. An exchange is a question of the user with
    all turns that follow it. Where the last exchange alone does not fit, its question and its reply
    share the room: each may have half of it, and what one does not need the other one gets. The
    question loses its beginning, and the reply its end. System prompt, role lines, tools and the
    turns between stay. Where those leave no room, the conversation does not fit.

    Args:
        tokenizer: the tokenizer.
        max_length: most tokens to keep.
        segments_of: function conversation -> its segments. The last one may be trained on.
        end_of: function ids -> ids to append as the end, or None for none.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        segments_of: Callable[[Conversation], list[Segment]],
        end_of: Callable[[Ids], Ids] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.segments_of = segments_of
        self.end_of = end_of
        self.shortener = Shortener(tokenizer, max_length)

    def fit_all(self, conversations: list[Conversation], rows: list[list[Segment]]) -> list[Fitted]:
        """Return conversations as tokens.

        Args:
            conversations: the conversations.
            rows: their segments.
        """
        short = [k for k, row in enumerate(rows) if not self.shortener.is_long([t for t, _ in row])]
        encoded = self._encode([rows[k] for k in short])
        whole = dict(zip(short, encoded, strict=True))
        fitted = []
        for k, conversation in enumerate(conversations):
            if k in whole and len(whole[k][0]) <= self.max_length:
                fitted.append(Fitted(*whole[k]))
            else:
                fitted.append(self.fit(conversation))
        return fitted

    def fit(self, conversation: Conversation) -> Fitted:
        """Return a conversation that is too long as tokens."""
        starts = conversation.exchanges()
        for count in range(self._least_dropped(conversation), len(starts)):
            kept = conversation.without_exchanges(count)
            ids, labels = self._encode([self.segments_of(kept)])[0]
            if len(ids) <= self.max_length:
                return Fitted(ids, labels, len(conversation.messages) - len(kept.messages))
        last = conversation.without_exchanges(len(starts) - 1)
        fitted = self._fit_exchange(last)
        return replace(fitted, dropped_turns=len(conversation.messages) - len(last.messages))

    def _least_dropped(self, conversation: Conversation) -> int:
        """Return the least number of exchanges to leave out, or their number if none suffices."""
        low, high = 1, len(conversation.exchanges())
        while low < high:
            middle = (low + high) // 2
            segments = self.segments_of(conversation.without_exchanges(middle))
            if self._count("".join(text for text, _ in segments)) <= self.max_length:
                high = middle
            else:
                low = middle + 1
        return low

    def _fit_exchange(self, exchange: Conversation) -> Fitted:
        """Return one exchange as tokens, whose question and reply are shortened."""
        room, reply_size = self._room(exchange)
        has_question = exchange.question() is not None
        if reply_size and room < (2 if has_question else 1):
            return Fitted(None, [])
        share = max(room - reply_size, room // 2, 1) if reply_size else max(room, 1)
        is_reply_whole = reply_size <= room - share
        kept, ids, labels = self._with_short_question(exchange, share)
        # A text's tokens depend on the text around it, so that some may be too many.
        for _ in range(ROUNDS):
            excess = len(ids) - self.max_length
            if not has_question or not is_reply_whole or not 0 < excess < share:
                break
            share -= excess
            kept, ids, labels = self._with_short_question(exchange, share)
        reply_cut = bool(reply_size) and len(ids) > self.max_length
        if reply_cut:
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if reply_size and all(label == IGNORED for label in labels):
            return Fitted(None, [])
        return Fitted(ids, labels, question_cut=kept is not exchange, reply_cut=reply_cut)

    def _room(self, exchange: Conversation) -> tuple[int, int]:
        """Return the tokens that question and reply may have together, and those of the reply.

        The reply has none where the conversation is a prompt.
        """
        turn = exchange.question()
        room = self.max_length
        if turn is not None:
            exchange = exchange.with_content(turn, PLACEHOLDER)
            room += self._count(PLACEHOLDER)
        *context, (last, is_trained) = self.segments_of(exchange)
        lines = "".join(text for text, _ in context)
        if not is_trained:
            return room - self._count(lines + last), 0
        reply = self._ids(last)
        return room - self._count(lines), len(reply) + len(self._end(reply))

    def _with_short_question(
        self, exchange: Conversation, count: int
    ) -> tuple[Conversation, Ids, Ids]:
        """Return an exchange whose question has at most `count` tokens, its ids and labels."""
        turn = exchange.question()
        if turn is not None:
            # Templates remove the white space around a text.
            question = str(exchange.messages[turn]["content"]).strip()
            short = self._last_tokens(self.shortener.tail(question), count)
            if short != question:
                exchange = exchange.with_content(turn, short)
        *context, (last, is_trained) = self.segments_of(exchange)
        if is_trained:
            last = self.shortener.head(last)
        ids, labels = self._encode([[*context, (last, is_trained)]])[0]
        return exchange, ids, labels

    def _encode(self, rows: list[list[Segment]]) -> list[tuple[Ids, Ids]]:
        encoded = []
        for ids, labels in encode_segments(self.tokenizer, rows, special=False):
            end = self._end(ids)
            encoded.append((ids + end, labels + end))
        return encoded

    def _end(self, ids: Ids) -> Ids:
        return [] if self.end_of is None else self.end_of(ids)

    def _count(self, text: str) -> int:
        """Return the number of tokens of a text, or some number above max_length."""
        return len(self._ids(text))

    def _ids(self, text: str) -> Ids:
        """Return the token ids of a text, or more than max_length of its first ones."""
        if not text:
            return []
        return token_ids(self.tokenizer, [self.shortener.head(text)], special=False)[0]

    def _last_tokens(self, text: str, count: int) -> str:
        """Return the end of a text that has at most `count` tokens, about as many as it can."""
        if self._count(text) <= count:
            return text
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            start, _ = encoded["offset_mapping"][-count]
            return text[start:]
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if self._count(text[len(text) - middle :]) <= count:
                low = middle
            else:
                high = middle - 1
        return text[len(text) - low :]
