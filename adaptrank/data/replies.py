"""Find the replies of the assistant in a rendered conversation.

A reply is what the model has to generate: it begins after the generation prompt of the chat
template, and ends with the token that closes the turn. Whatever the template writes after that
token, mostly a line break, is never generated.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from adaptrank._errors import UserError
from adaptrank.data.chat_conversation import Conversation, Message
from adaptrank.data.chat_template import ChatTemplate
from adaptrank.data.segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING = re.compile(r"</?think>")
"""Marks around the reasoning in a reply."""

EMPTY_THINKING = re.compile(r"(?:\s|</?think>)*")
"""Marks of a reasoning that is empty."""

PIECE = r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|."
"""A mark, a word, or a single character. A text may begin like another one within them."""

OUT = "Give another template with `chat_template`."
"""The way out where a template cannot say which tokens to train on."""


class UnmaskableError(UserError):
    """A template does not say exactly which part of a conversation is a reply."""


@dataclass(frozen=True)
class Reply:
    """Place of a reply in the text of the conversation that ends with it.

    Args:
        text: the rendered conversation up to the reply and its closing.
        start: character at which the reply begins.
        end: character after the token that closes the reply.
        unseen: the generation prompt, if the text does not have all of it, else "".
    """

    text: str
    start: int
    end: int
    unseen: str = ""


@dataclass(frozen=True)
class Example:
    """A conversation as segments. The last segment is trained on.

    Args:
        conversation: its turns.
        segments: its text.
        only_last: whether the last reply alone is trained on.
        unseen: the generation prompt, if the text does not have all of it, else "".
    """

    conversation: Conversation
    segments: list[Segment]
    only_last: bool = False
    unseen: str = ""


def examples_of(template: ChatTemplate, conversation: Conversation) -> list[Example]:
    """Return the examples of a conversation.

    There is one if the template renders each turn as it does where the conversation ends with it.
    Otherwise there is one for each reply: the conversation up to it, as the model is given it in
    use.

    Raises:
        UserError: if the template does not say exactly what the replies are.
    """
    whole = whole_example(template, conversation)
    if whole is not None:
        return [whole]
    turns = conversation.trained_turns()
    return [last_example(template, conversation.until(turn + 1), only_last=True) for turn in turns]


def whole_example(template: ChatTemplate, conversation: Conversation) -> Example | None:
    """Return a conversation as one example, or None if a turn would change at the end.

    Raises:
        UserError: if the template cannot render it, or if there is nothing to train on.
    """
    turns = conversation.trained_turns()
    try:
        return _example(template, conversation, turns)
    except UnmaskableError:
        return None


def last_example(template: ChatTemplate, conversation: Conversation, only_last: bool) -> Example:
    """Return a conversation as one example.

    Args:
        template: the template.
        conversation: the conversation.
        only_last: train on the last reply only.

    Raises:
        UserError: if the template does not say exactly what the replies are.
    """
    turns = conversation.trained_turns()
    if only_last:
        turns = turns[-1:]
    try:
        example = _example(template, conversation, turns)
    except UnmaskableError as error:
        raise UnmaskableError(f"The conversation {conversation.excerpt()}: {error}") from error
    return replace(example, only_last=only_last)


def _example(template: ChatTemplate, conversation: Conversation, turns: list[int]) -> Example:
    """Return a conversation as one example, with some of its turns trained on."""
    marks: list[tuple[int, int]] | None = None
    if template.marks_replies:
        text, marks = template.render_marked(conversation)
    else:
        text = template.render(conversation)
    pieces: list[tuple[int, int]] = []
    unseen = ""
    for turn in turns:
        reply = find_reply(template, conversation, turn)
        if text[: reply.end] != reply.text[: reply.end]:
            raise UnmaskableError(
                "The chat template renders a turn differently when others follow, so its tokens "
                f"cannot be told apart. {OUT}"
            )
        pieces += [(reply.start, reply.end)] if marks is None else _marked(template, reply, marks)
        unseen = unseen or reply.unseen
    return Example(conversation, _segments(text, pieces), unseen=unseen)


def _marked(
    template: ChatTemplate, reply: Reply, marks: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the pieces of a reply that the template marks, and its closing token.

    Raises:
        UnmaskableError: if there is none.
    """
    inside = [(max(start, reply.start), min(end, reply.end)) for start, end in marks]
    pieces = sorted((start, end) for start, end in inside if start < end)
    if not pieces:
        raise UnmaskableError(
            "The chat template has `{% generation %}`, and marks nothing of a reply by it. "
            f"Put the statement around the replies, or leave it out of the template. {OUT}"
        )
    last_start, last_end = pieces[-1]
    rest = reply.text[last_end : reply.end].strip()
    if rest and rest in added_tokens(template.tokenizer):
        # Without its closing token, a reply would not teach the model to stop.
        pieces[-1] = (last_start, reply.end)
    return pieces


def _segments(text: str, pieces: list[tuple[int, int]]) -> list[Segment]:
    """Return a text as segments, of which the pieces are trained on."""
    segments: list[Segment] = []
    position = 0
    for start, end in pieces:
        if start > position or not segments:
            segments.append((text[position:start], False))
            segments.append((text[start:end], True))
        else:
            # Pieces that touch are one.
            before, _ = segments.pop()
            segments.append((before + text[max(start, position) : end], True))
        position = max(end, position)
    return segments


# ---- the place of a reply


def find_reply(template: ChatTemplate, conversation: Conversation, turn: int) -> Reply:
    """Return where a reply stands in the conversation that ends with it.

    Args:
        template: the template.
        conversation: the conversation.
        turn: index of the assistant's turn.

    Raises:
        UserError: if the template does not say it exactly.
    """
    message = conversation.messages[turn]
    closed = conversation.until(turn + 1)
    text = template.render(closed)
    opening = _opening(template, closed)
    if text.startswith(opening):
        start, unseen = len(opening), ""
    else:
        start, unseen = _start_behind_another_opening(template, closed, text, opening)
    end = _end_of_reply(template.tokenizer, text, start, message)
    missing = _missing_part(message, text[start:end])
    if missing:
        raise UnmaskableError(
            f"The chat template leaves out a part of a reply, {missing[:40]!r}, so it cannot be "
            f"trained on. Remove the part from the data. {OUT}"
        )
    return Reply(text, start, end, unseen)


def _opening(template: ChatTemplate, closed: Conversation) -> str:
    """Return the text before the last turn, with the generation prompt."""
    turn = len(closed.messages) - 1
    if turn:
        return template.render(closed.until(turn), ask=True)
    # A template cannot open the first turn of all. Two such turns begin alike up to their content.
    renderings = [template.render(closed.with_content(0, letter)) for letter in "ab"]
    return renderings[0][: _common_length(*renderings)]


def _start_behind_another_opening(
    template: ChatTemplate, closed: Conversation, text: str, opening: str
) -> tuple[int, str]:
    """Return where a reply starts whose turn does not open with the generation prompt.

    Some templates open the reasoning in the generation prompt only. The reply then begins behind
    the last token, mark or word of the generation prompt that its turn has as a whole. The marks of
    an empty reasoning belong to it.

    Returns:
        The start, and the generation prompt.

    Raises:
        UnmaskableError: if something else differs.
    """
    asked = template.render(closed.asked())
    header = _common_length(asked, opening)
    shared = _shared_pieces(template.tokenizer, text, opening, header)
    message = closed.messages[-1]
    written = _written(message)
    # A call of a tool stands behind the content, and may repeat it.
    find = text.find if message.get("tool_calls") else text.rfind
    position = find(written, header) if written else shared
    start = min(shared, position) if position >= 0 else shared
    between = text[start:position] if position >= 0 else ""
    if start <= header or not EMPTY_THINKING.fullmatch(between):
        raise UnmaskableError(
            "The generation prompt of the chat template is not the beginning of the turn that it "
            f"opens, so its tokens cannot be told apart. {OUT}"
        )
    return start, opening[header:]


def _written(message: Message) -> str:
    """Return the content of a turn as templates write it. It is "" beside calls of tools alone."""
    content = message["content"]
    return content.strip() if isinstance(content, str) else ""


def _shared_pieces(
    tokenizer: "PreTrainedTokenizerBase", text: str, opening: str, header: int
) -> int:
    """Return where the last piece of an opening ends with which a text begins.

    Args:
        tokenizer: its added tokens are pieces, and so are marks, words and single characters.
        text: the text.
        opening: the opening.
        header: length of the beginning that is one piece.
    """
    if not text.startswith(opening[:header]):
        return 0
    shared = header
    for piece in _pieces(tokenizer).finditer(opening, header):
        if not text.startswith(piece[0], shared):
            break
        shared = piece.end()
    return shared


def _common_length(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _missing_part(message: Message, reply: str) -> str:
    """Return a part of a turn that its rendered text does not have, or ""."""
    content = message["content"]
    parts = THINKING.split(content) if isinstance(content, str) else []
    for call in message.get("tool_calls", []):
        parts.append(str(call.get("function", call).get("name", "")))
    missing = [part.strip() for part in parts if part.strip() not in reply]
    return missing[0] if missing else ""


def _end_of_reply(
    tokenizer: "PreTrainedTokenizerBase", text: str, start: int, message: Message
) -> int:
    """Return where a reply ends, with its end token: the first special token after the content.

    Calls of tools are text of special tokens themselves. Behind them it is the last one.

    Args:
        tokenizer: the tokenizer.
        text: the conversation up to and with the reply.
        start: where the reply begins.
        message: the turn.
    """
    written = _written(message)
    position = text.find(written, start)
    if position >= 0:
        start = position + len(written)
    if message.get("tool_calls"):
        bare = text.rstrip()
        is_closed = len(bare) > start and bare.endswith(tuple(added_tokens(tokenizer)))
        return len(bare) if is_closed else len(text)
    for pattern in _closing_patterns(tokenizer):
        match = pattern.search(text, start)
        if match is not None:
            return match.end(1)
    return len(text)


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Return the tokens beside the text: special tokens, and those that were added."""
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return {str(token) for token in tokens if str(token).strip()}


_patterns: "WeakKeyDictionary[Any, tuple[int, list[re.Pattern[str]]]]" = WeakKeyDictionary()
"""Tokenizer -> (number of its tokens, its patterns)."""


def _closing_patterns(tokenizer: "PreTrainedTokenizerBase") -> list[re.Pattern[str]]:
    """Return patterns of tokens that close a text: first the special ones, then all added ones.

    Only white space may stand between and after the tokens. Group 1 is the first of them.
    """
    size, patterns = _patterns.get(tokenizer, (-1, []))
    if size != len(tokenizer):
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special}
        special |= {str(token) for token in tokenizer.all_special_tokens}
        groups = (special, {token.content for token in added})
        patterns = [_closing_pattern(group) for group in groups if any(map(str.strip, group))]
        _patterns[tokenizer] = (len(tokenizer), patterns)
    return patterns


def _closing_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    token = "|".join(map(re.escape, longest_first))
    return re.compile(rf"({token})(?:\s|{token})*\Z")


def _pieces(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Return a pattern of the pieces of a text that begin and end together."""
    longest_first = sorted(added_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), PIECE]), re.DOTALL)
