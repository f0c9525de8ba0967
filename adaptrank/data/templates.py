"""Conversations by the chat template of a tokenizer: their text, their replies, their end."""

from typing import TYPE_CHECKING, Any

from adaptrank.data.chat_conversation import Message, conversation_of
from adaptrank.data.chat_template import ChatTemplate
from adaptrank.data.replies import last_example
from adaptrank.data.segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    ask: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """Render a conversation by the tokenizer's chat template.

    Args:
        tokenizer: the tokenizer.
        messages: the turns.
        ask: open the assistant's next turn at the end.
        tools: JSON schemas of the tools that the assistant may call.

    Raises:
        UserError: if the tokenizer has no chat template, or if it raises.
    """
    template = ChatTemplate(tokenizer, with_tools=bool(tools))
    return template.render(conversation_of(messages, tools), ask=ask)


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: list[Any] | None = None
) -> str:
    """Render a conversation up to its last reply, with that reply opened, as `predict` does.

    Raises:
        UserError: if the tokenizer has no chat template, or if it raises.
    """
    template = ChatTemplate(tokenizer, with_tools=bool(tools))
    return template.render(conversation_of(messages, tools).asked(), ask=True)


def chat_segments(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[Segment]:
    """Render a conversation as segments. The assistant's turns, each with its end, are trained on.

    Raises:
        UserError: if there is no template or no turn of the assistant, or if the template rewrites
            earlier turns.
    """
    template = ChatTemplate(tokenizer)
    return last_example(template, conversation_of(messages), only_last=False).segments


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
