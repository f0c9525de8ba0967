"""Conversations as tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

from adaptrank._errors import UserError
from adaptrank.data.chat_conversation import Conversation
from adaptrank.data.chat_format import ChatFormat
from adaptrank.data.collate import IGNORED
from adaptrank.data.replies import Example, last_example
from adaptrank.data.segments import Segment, added_ids
from adaptrank.data.turn_dropping import Fitted, Ids, TurnDropper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class ChatCuts:
    """Numbers of conversations that were longer than max_length, by what became of them.

    Args:
        examples: number of all.
        shortened: those that lost whole turns only.
        turns: the turns that those lost.
        questions: those whose last question was cut.
        replies: those whose last reply was cut.
        left_out: those of which not even the system prompt and the role lines fit.
    """

    examples: int = 0
    shortened: int = 0
    turns: int = 0
    questions: int = 0
    replies: int = 0
    left_out: int = 0

    def add(self, fitted: Fitted) -> None:
        """Count a conversation."""
        self.examples += 1
        if fitted.ids is None:
            self.left_out += 1
        elif fitted.reply_cut:
            self.replies += 1
        elif fitted.question_cut:
            self.questions += 1
        elif fitted.dropped_turns:
            self.shortened += 1
            self.turns += fitted.dropped_turns

    def counts(self) -> dict[str, int]:
        """Return {what was cut: number of conversations}, for `TaskData.report_cuts`."""
        return {
            f"conversations without their first turns ({self.turns} turns)": self.shortened,
            "conversations down to their last question, cut from the left": self.questions,
            "conversations down to their last reply, cut from the right": self.replies,
            "conversations left out, whose last turn has no room": self.left_out,
        }


@dataclass(frozen=True)
class ChatExample:
    """An example of a conversation.

    Args:
        conversation: the conversation, or its beginning.
        ids: token ids.
        labels: their labels, -100 where not trained on.
    """

    conversation: Conversation
    ids: Ids
    labels: Ids

    def ends(self) -> list[int]:
        """Return the last id of each reply."""
        is_trained = [label != IGNORED for label in self.labels]
        following = [*is_trained[1:], False]
        pairs = zip(self.ids, is_trained, following, strict=True)
        return [number for number, here, next_one in pairs if here and not next_one]


@dataclass
class ChatEncoder:
    """Encoder of conversations.

    Args:
        tokenizer: the tokenizer.
        chat_format: the template and how it makes examples.
        max_length: most tokens of an example.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat_format: ChatFormat
    max_length: int
    cuts: ChatCuts = field(default_factory=ChatCuts)

    def completions(
        self, conversations: Sequence[Conversation], one_each: Sequence[bool]
    ) -> list[tuple[int, ChatExample]]:
        """Return (index of a conversation, example) of all examples, and count what is cut.

        Args:
            conversations: the conversations.
            one_each: whether a conversation has one example at most, for its last reply.
        """
        self.cuts = ChatCuts()
        examples = self.chat_format.examples(conversations)
        flat: list[tuple[int, Example]] = []
        for k, several in enumerate(examples):
            flat += [(k, example) for example in (several[-1:] if one_each[k] else several)]
        encoded = []
        fitted = self._fit_examples([example for _, example in flat])
        for (k, example), one in zip(flat, fitted, strict=True):
            self.cuts.add(one)
            if one.ids is not None:
                encoded.append((k, ChatExample(example.conversation, one.ids, one.labels)))
        return encoded

    def _fit_examples(self, examples: list[Example]) -> list[Fitted]:
        fitted: dict[int, Fitted] = {}
        for only_last in (False, True):
            indices = [k for k, one in enumerate(examples) if one.only_last is only_last]
            conversations = [examples[k].conversation for k in indices]
            segments = [examples[k].segments for k in indices]
            dropper = self._dropper(partial(self._example_segments, only_last=only_last))
            results = dropper.fit_all(conversations, segments)
            fitted |= dict(zip(indices, results, strict=True))
        return [fitted[k] for k in range(len(examples))]

    def prompts(self, conversations: Sequence[Conversation]) -> list[tuple[str, Ids]]:
        """Return (text, ids) before the last reply of each conversation, and count what is cut."""
        self.cuts = ChatCuts()
        asked = [conversation.asked() for conversation in conversations]
        segments = [self._prompt_segments(conversation) for conversation in asked]
        dropper = TurnDropper(self.tokenizer, self.max_length, self._prompt_segments)
        prompts = []
        for [(text, _)], one in zip(segments, dropper.fit_all(asked, segments), strict=True):
            self.cuts.add(one)
            prompts.append((text, one.ids or []))
        return prompts

    def choices(self, conversation: Conversation, choices: Sequence[str]) -> list[tuple[Ids, Ids]]:
        """Return ids and labels of a conversation with each of several replies.

        No end token follows a choice, because log p(choice | prompt) is compared.

        Raises:
            UserError: if a choice has no room.
        """
        encoded = []
        for choice in choices:
            make_segments = partial(self._choice_segments, choice=choice.strip())
            dropper = TurnDropper(self.tokenizer, self.max_length, make_segments)
            answered = conversation.answered(choice)
            [one] = dropper.fit_all([answered], [make_segments(answered)])
            if one.ids is None:
                raise UserError(
                    f"max_length={self.max_length} has no room for the choice {choice[:40]!r} of "
                    f"the conversation {conversation.excerpt()}. Raise it."
                )
            encoded.append((one.ids, one.labels))
        return encoded

    @cached_property
    def _added(self) -> frozenset[int]:
        return added_ids(self.tokenizer)

    # ---- segments of a conversation

    def _end_of(self, ids: Ids) -> Ids:
        """Return the end token, if the template has not ended a conversation by a token."""
        end = self.tokenizer.eos_token_id
        is_ended = bool(ids) and ids[-1] in self._added
        return [] if end is None or is_ended else [end]

    def _dropper(self, make_segments: Callable[[Conversation], list[Segment]]) -> TurnDropper:
        return TurnDropper(self.tokenizer, self.max_length, make_segments, self._end_of)

    def _example_segments(self, conversation: Conversation, only_last: bool) -> list[Segment]:
        return last_example(self.chat_format.template, conversation, only_last).segments

    def _prompt_segments(self, conversation: Conversation) -> list[Segment]:
        return [(self.chat_format.template.render(conversation, ask=True), False)]

    def _choice_segments(self, conversation: Conversation, choice: str) -> list[Segment]:
        *context, (reply, _) = self._example_segments(conversation, only_last=True)
        end = reply.find(choice) + len(choice)
        return [*((text, False) for text, _ in context), (reply[:end], True)]
