"""Render conversations by a chat template."""

import copy
import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from adaptrank._errors import UserError, some
from adaptrank.backbones import chat_template_of
from adaptrank.data.chat_conversation import Conversation, Message, flat_message
from adaptrank.data.template_names import shipped_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Statement of a template after which the text of a reply begins."""

PROBE = "adaptrank probe"
"""Text by which a template shows whether it writes something."""

RENDERING_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)
"""Errors of a template that does not fit a conversation."""


class ChatTemplate:
    """A chat template, with the tokenizer whose special tokens it writes.

    Args:
        tokenizer: the tokenizer.
        text: the template in Jinja, or None for the tokenizer's own.
        with_tools: whether conversations have tools. A tokenizer may have a template for them.

    Raises:
        UserError: if there is no template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        text: str | None = None,
        *,
        with_tools: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.text = own_template(tokenizer, with_tools) if text is None else text

    @cached_property
    def marks_replies(self) -> bool:
        """Whether the template marks the text of replies by `{% generation %}`."""
        return MARKER.search(self.text) is not None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a turn's content has to be a list of parts, as for models that see images."""
        as_text = self._try_content(PROBE)
        return not as_text and self._try_content([{"type": "text", "text": PROBE}])

    def _try_content(self, content: Any) -> bool:
        """Tell whether the template writes a user's text that is given in this form."""
        try:
            return PROBE in self._apply([{"role": "user", "content": content}], None, ask=False)
        except RENDERING_ERRORS:
            return False

    def render(self, conversation: Conversation, *, ask: bool = False) -> str:
        """Return the text of a conversation.

        Args:
            conversation: the conversation.
            ask: open the assistant's next turn at the end.

        Raises:
            UserError: if the template raises.
        """
        if not conversation.messages:
            raise UserError("A conversation has no turns. Remove such rows.")
        first_error: Exception | None = None
        for messages in self._spellings(conversation):
            try:
                return self._apply(messages, conversation.tools, ask=ask)
            except RENDERING_ERRORS as error:
                first_error = first_error or error
        raise self._refusal(conversation, first_error) from first_error

    def render_marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and the pieces (start, end) that the template marks.

        Raises:
            UserError: if the template raises.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        # Its annotations are not those of its arguments.
        render: Any = render_jinja_template
        first_error: Exception | None = None
        for messages in self._spellings(conversation):
            try:
                texts, marks = render(
                    conversations=[messages],
                    tools=conversation.tools,
                    chat_template=self.text,
                    return_assistant_tokens_mask=True,
                    add_generation_prompt=False,
                    **self.tokenizer.special_tokens_map,
                )
            except RENDERING_ERRORS as error:
                first_error = first_error or error
            else:
                return texts[0], [(int(start), int(end)) for start, end in marks[0]]
        raise self._refusal(conversation, first_error) from first_error

    def _apply(self, messages: list[Message], tools: list[Any] | None, *, ask: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.text,
            tokenize=False,
            add_generation_prompt=ask,
        )
        return str(text)

    def _spellings(self, conversation: Conversation) -> Iterator[list[Message]]:
        """Yield the forms of a conversation that templates read: arguments of tools as objects
        first, and as JSON texts second.
        """
        messages = conversation.messages
        if self.takes_parts:
            messages = [_with_parts(message) for message in messages]
        yield messages
        if any(message.get("tool_calls") for message in messages):
            yield [_with_written_arguments(message) for message in messages]

    def _refusal(self, conversation: Conversation, error: Exception | None) -> UserError:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        return UserError(
            f"The chat template cannot render the conversation {conversation.excerpt()} "
            f"({reason}). Change or remove such rows, or give another template with "
            "`chat_template`."
        )

    def ignored(self, conversation: Conversation) -> list[str]:
        """Return what the template leaves out of a conversation: roles of turns, and its tools."""
        names = []
        whole = self.render(conversation)
        roles = {message["role"]: k for k, message in enumerate(conversation.messages)}
        for role, k in roles.items():
            if role == "assistant":
                continue
            other = conversation.with_content(k, PROBE)
            if self._renders_alike(other, whole):
                names.append(f"turns of the role {role!r}")
        if conversation.tools:
            without = Conversation(conversation.messages)
            if self._renders_alike(without, whole):
                names.append("the tools")
        return names

    def _renders_alike(self, conversation: Conversation, text: str) -> bool:
        try:
            return self.render(conversation) == text
        except UserError:
            return False


def own_template(tokenizer: "PreTrainedTokenizerBase", with_tools: bool = False) -> str:
    """Return the chat template of a tokenizer.

    Args:
        tokenizer: the tokenizer.
        with_tools: take the template for conversations with tools, if the tokenizer has one.

    Raises:
        UserError: if there is none, or if there are several and none is the default.
    """
    templates = getattr(tokenizer, "chat_template", None)
    if not templates:
        raise UserError(
            "This tokenizer has no chat template. Take an Instruct model, give a template with "
            "`chat_template`, or set `chat: false`."
        )
    if with_tools and isinstance(templates, dict) and "tool_use" in templates:
        return str(templates["tool_use"])
    template = chat_template_of(tokenizer)
    if template is None:
        raise UserError(
            f"This tokenizer has the chat templates {some(sorted(templates))}, and none is its "
            "default. Name one with `chat_template`."
        )
    return template


def training_template(template: ChatTemplate) -> tuple[ChatTemplate, str] | None:
    """Return TRL's training template for exactly this template, and its name, or None.

    TRL brings variants of well-known templates that render every turn alike and mark the replies.
    They are the files `NAME_training` beside `NAME`, read without an import of TRL.
    """
    shipped = shipped_templates()
    for name, file in shipped.items():
        variant = shipped.get(f"{name}_training")
        if variant is not None and file.read_text(encoding="utf-8") == template.text:
            text = variant.read_text(encoding="utf-8")
            return ChatTemplate(template.tokenizer, text), variant.stem
    return None


def _with_parts(message: Message) -> Message:
    """Return a turn whose content is a list with one part."""
    return {**message, "content": [{"type": "text", "text": flat_message(message)["content"]}]}


def _with_written_arguments(message: Message) -> Message:
    """Return a turn whose tool calls have their arguments as JSON texts."""
    if not message.get("tool_calls"):
        return message
    message = copy.deepcopy(message)
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return message
