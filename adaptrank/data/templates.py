"""Render conversations by the chat template of a tokenizer."""

from typing import TYPE_CHECKING

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
        end = _end_of_reply(closing, len(opening), tokenizer.eos_token)
        segments.append((whole[position : len(opening)], False))
        segments.append((whole[len(opening) : end], True))
        position = end
    if not segments:
        roles = sorted({message["role"] for message in messages})
        raise UserError(
            f"A conversation has no assistant turn to train on (its roles are {roles})."
        )
    return segments


def _end_of_reply(text: str, start: int, eos_token: str | None) -> int:
    """Return where the reply that begins at `start` ends, with its end token.

    A model never generates the text that a template writes after the end, mostly a line break.
    """
    position = text.rfind(eos_token, start) if eos_token else -1
    if eos_token and position >= 0:
        return position + len(eos_token)
    return len(text)
