"""The format of a run's conversations: which chat template renders them, and as which examples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptrank._errors import UserError
from adaptrank.data.chat_conversation import ASSISTANT, Conversation
from adaptrank.data.chat_template import ChatTemplate, training_template
from adaptrank.data.replies import Example, examples_of, whole_example
from adaptrank.data.template_names import template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a turn may have its reasoning."""


class ChatFormat:
    """The chat template of a run, chosen by the first conversations of several replies, and kept.

    It is the one that the user gives, else the tokenizer's own. Where the tokenizer's own template
    renders a turn differently when others follow, TRL's training template for it takes its place,
    if TRL is installed and has one. Where there is none, such a conversation becomes one example
    for each reply.

    Args:
        tokenizer: the tokenizer.
        given: text, file or name of the template that the user gives, or None.

    Raises:
        UserError: if there is no template of this name.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", given: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.given = None if given is None else template_text(given, tokenizer)
        self.notes: list[str] = []
        self._first: ChatTemplate | None = None
        self._chosen: ChatTemplate | None = None
        self._seen_roles: set[str] = set()

    @property
    def template(self) -> ChatTemplate:
        """The chosen template, or before the choice the one to begin with."""
        if self._chosen is not None:
            return self._chosen
        if self._first is None:
            self._first = self._first_template(())
        return self._first

    def _first_template(self, conversations: Sequence[Conversation]) -> ChatTemplate:
        with_tools = any(conversation.tools for conversation in conversations)
        return ChatTemplate(self.tokenizer, self.given, with_tools=with_tools)

    def examples(self, conversations: Sequence[Conversation]) -> list[list[Example]]:
        """Return the examples of each conversation, at least one each.

        Raises:
            UserError: if a conversation has nothing to train on, or if the template cannot render
                it or does not say exactly what its replies are.
        """
        if self._chosen is None:
            examples = self._choose(conversations)
        else:
            examples = [examples_of(self._chosen, one) for one in conversations]
        self._look_at(conversations, examples)
        return examples

    def _choose(self, conversations: Sequence[Conversation]) -> list[list[Example]]:
        """Choose the template by the conversations, and return their examples."""
        template = self._first_template(conversations)
        error: UserError | None = None
        try:
            examples = [examples_of(template, one) for one in conversations]
        except UserError as caught:
            examples, error = [], caught
        is_whole = error is None and all(len(several) == 1 for several in examples)
        if not is_whole and self.given is None:
            trained = self._by_training_template(template, conversations)
            if trained is not None:
                return trained
        if error is not None:
            raise error
        self._first = template
        if any(len(conversation.trained_turns()) > 1 for conversation in conversations):
            self._chosen = template
        return examples

    def _by_training_template(
        self, own: ChatTemplate, conversations: Sequence[Conversation]
    ) -> list[list[Example]] | None:
        """Return the examples by TRL's training template, or None if it does not help."""
        found = training_template(own)
        if found is None:
            return None
        template, name = found
        examples = []
        for conversation in conversations:
            try:
                example = whole_example(template, conversation)
            except UserError:
                return None
            if example is None:
                return None
            examples.append([example])
        self._chosen = template
        self.notes.append(
            "The chat template of the tokenizer renders a turn differently when others follow, so "
            f"conversations are rendered by TRL's training template for it, {name}. The adapter "
            "records it, and `generate` uses it. `chat_template` takes another one."
        )
        return examples

    # ---- what the log says about the data

    def take_notes(self) -> list[str]:
        """Return the sentences since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def _look_at(
        self, conversations: Sequence[Conversation], examples: list[list[Example]]
    ) -> None:
        """Note how the conversations fit the template."""
        self._note_ignored(conversations)
        split = [several for several in examples if len(several) > 1]
        if split:
            self.notes.append(
                f"{len(split)} of {len(examples)} conversations became one example for each "
                f"reply, {sum(map(len, split))} in all, because the chat template renders a turn "
                "differently when others follow."
            )
        unseen = [several[-1].unseen for several in examples if several[-1].unseen]
        if unseen:
            self.notes.append(
                f"In use the chat template opens a reply by {unseen[0]!r}, and the replies of "
                f"{len(unseen)} of {len(examples)} conversations do not begin so. Write their "
                "reasoning into the data, as in <think>...</think>, or give another template with "
                "`chat_template`."
            )
        lost = sum(_has_lost_reasoning(several) for several in examples)
        if lost:
            self.notes.append(
                f"The chat template leaves out the reasoning of {lost} of {len(examples)} "
                "conversations. Give a template that writes it with `chat_template`, or remove it."
            )

    def _note_ignored(self, conversations: Sequence[Conversation]) -> None:
        """Note the roles and tools that the template leaves out, looking at each role once."""
        for conversation in conversations:
            roles = {message["role"] for message in conversation.messages}
            roles |= {"tools"} if conversation.tools else set()
            if roles <= self._seen_roles:
                continue
            self._seen_roles |= roles
            ignored = self.template.ignored(conversation)
            if ignored:
                self.notes.append(
                    f"The chat template leaves out {' and '.join(ignored)}. Give a template that "
                    "writes them with `chat_template`, or remove them from the data."
                )


def _has_lost_reasoning(examples: Sequence[Example]) -> bool:
    """Tell whether a reply has its reasoning under a key that its text does not have."""
    for example in examples:
        text = "".join(piece for piece, _ in example.segments)
        turns = example.conversation.messages
        for message in turns[-1:] if example.only_last else turns:
            reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
            if message["role"] == ASSISTANT and str(reasoning).strip() not in text:
                return True
    return False
