"""The turns of a conversation, as plain values."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptrank._errors import UserError

Message = dict[str, Any]
"""One turn of a conversation: {"role": ..., "content": ...}, and keys such as `tool_calls`."""

LEADING_ROLES = ("system", "developer")
"""Roles of the turns that stand before a conversation and hold for all of it."""

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, each with its content as one text.

    Args:
        messages: the turns.
        tools: JSON schemas of the tools that the assistant may call, or None.
    """

    messages: list[Message]
    tools: list[Any] | None = None

    def until(self, count: int) -> "Conversation":
        """Return the first `count` turns."""
        return Conversation(self.messages[:count], self.tools)

    def asked(self) -> "Conversation":
        """Return the conversation without its last turn, if that is the assistant's."""
        is_answered = self.messages[-1]["role"] == ASSISTANT
        return self.until(len(self.messages) - 1) if is_answered else self

    def answered(self, content: str) -> "Conversation":
        """Return the conversation up to its last question, with another reply."""
        reply = {"role": ASSISTANT, "content": content}
        return Conversation([*self.asked().messages, reply], self.tools)

    def with_content(self, index: int, content: str) -> "Conversation":
        """Return the conversation with another content of one turn."""
        messages = list(self.messages)
        messages[index] = {**messages[index], "content": content}
        return Conversation(messages, self.tools)

    def trained_turns(self) -> list[int]:
        """Return the indices of the assistant's turns but those of weight 0.

        Raises:
            UserError: if there is none.
        """
        turns = [
            k
            for k, message in enumerate(self.messages)
            if message["role"] == ASSISTANT and message.get("weight", 1) != 0
        ]
        if not turns:
            roles = sorted({message["role"] for message in self.messages})
            raise UserError(
                f"A conversation has no assistant turn to train on (its roles are {roles})."
            )
        return turns

    def lead(self) -> int:
        """Return the number of turns before the conversation, such as the system prompt."""
        for k, message in enumerate(self.messages):
            if message["role"] not in LEADING_ROLES:
                return k
        return len(self.messages)

    def exchanges(self) -> list[int]:
        """Return the indices at which exchanges begin. An exchange is a question with what follows.

        Turns before the first question belong to the first exchange.
        """
        first = self.lead()
        roles = [message["role"] for message in self.messages]
        later = [k for k in range(first + 1, len(roles)) if roles[k] == "user" != roles[k - 1]]
        return [first, *later]

    def without_exchanges(self, count: int) -> "Conversation":
        """Return the conversation without its first exchanges. The system prompt stays."""
        start = self.exchanges()[count]
        return Conversation(self.messages[: self.lead()] + self.messages[start:], self.tools)

    def question(self) -> int | None:
        """Return the index of the last turn of the user, or None."""
        asked = [k for k, message in enumerate(self.messages) if message["role"] == "user"]
        return asked[-1] if asked else None

    def excerpt(self) -> str:
        """Return the beginning of the conversation's first text, quoted, for errors."""
        texts = [message["content"] for message in self.messages[self.lead() :]]
        text = " ".join(str(next(filter(None, texts), "")).split())
        return repr(text if len(text) <= 40 else text[:40] + "...")


def conversation_of(messages: Sequence[Message], tools: Any = None) -> Conversation:
    """Return a conversation of turns as data have them.

    A content is a text, a list of parts of text, or nothing. The arguments of a tool call are an
    object, or the JSON text of one.

    Raises:
        UserError: if a part of a content is no text, or if the tools are no list.
    """
    if isinstance(tools, str):
        tools = _parsed(tools)
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"The tools of a conversation are {repr(tools)[:40]}, and no list.")
    return Conversation([flat_message(message) for message in messages], tools or None)


def flat_message(message: Message) -> Message:
    """Return a turn whose content is a text, and whose tool calls have objects as arguments."""
    turn = {key: value for key, value in message.items() if value is not None}
    content = turn.get("content", "")
    if isinstance(content, list | tuple):
        content = "".join(map(_text_of_part, content))
    turn["content"] = content
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_with_parsed_arguments(call) for call in turn["tool_calls"]]
    else:
        # Templates ask whether the key is there.
        turn.pop("tool_calls", None)
    return turn


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UserError(
        f"The content of a turn has a part of the type {kind!r}, and training reads texts only. "
        "Remove such parts."
    )


def _with_parsed_arguments(call: Any) -> Any:
    """Return a tool call whose arguments are an object, where they are the JSON text of one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_parsed_arguments(call["function"])}
    arguments = call.get("arguments")
    parsed = _parsed(arguments) if isinstance(arguments, str) else arguments
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call


def _parsed(text: str) -> Any:
    """Return the value of a JSON text, or the text itself if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text
