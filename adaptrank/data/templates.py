"""Render conversations by the chat template of a tokenizer, and find where a turn ends."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from adaptrank._errors import UserError
from adaptrank.data.segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], *, ask: bool = False
) -> str:
    """Render a conversation by the tokenizer's chat template.

    Args:
        tokenizer: the tokenizer.
        messages: the turns.
        ask: open the assistant's next turn at the end.

    Raises:
        UserError: if the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "This tokenizer has no chat template. Take an Instruct model, or set `chat: false`."
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))


def chat_segments(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[Segment]:
    """Render a conversation as segments. The assistant's turns, each with its end, are trained on.

    Raises:
        UserError: if there is no template or no turn of the assistant, or if the template rewrites
            earlier turns.
    """
    whole = render_chat(tokenizer, messages)
    segments: list[Segment] = []
    position = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = render_chat(tokenizer, messages[:i], ask=True)
        closing = render_chat(tokenizer, messages[: i + 1])
        if not whole.startswith(opening) or not whole.startswith(closing):
            raise UserError(
                "The chat template renders a turn differently when others follow, so its tokens "
                "cannot be told apart. Give conversations with one assistant turn, or "
                "`chat: false` with prompt and completion."
            )
        end = _end_of_reply(tokenizer, closing, len(opening), message["content"])
        segments.append((whole[position : len(opening)], False))
        segments.append((whole[len(opening) : end], True))
        position = end
    if not segments:
        roles = sorted({message["role"] for message in messages})
        raise UserError(
            f"A conversation has no assistant turn to train on (its roles are {roles})."
        )
    return segments


def _end_of_reply(tokenizer: "PreTrainedTokenizerBase", text: str, start: int, content: Any) -> int:
    """Return where a reply ends, with its end token: the first special token after the content.

    A model never generates the text that a template writes after the end, mostly a line break.

    Args:
        tokenizer: the tokenizer.
        text: the conversation up to and with the reply.
        start: where the reply begins.
        content: text of the reply, as the message has it.
    """
    written = content.strip() if isinstance(content, str) else ""
    position = text.find(written, start)
    if position >= 0:
        start = position + len(written)
    for pattern in _closing_patterns(tokenizer):
        match = pattern.search(text, start)
        if match is not None:
            return match.end(1)
    return len(text)


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


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the token that ends a turn of the assistant by the chat template, or None.

    None stands for a template that writes no token at the end, and for a tokenizer without one.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    *_, (reply, _) = chat_segments(tokenizer, messages)
    end = reply.rpartition("Ho")[2].strip()
    return end if end in tokenizer.get_vocab() else None
