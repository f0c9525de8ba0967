"""The task of completing prompts."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError
from adaptrank.backbones import chat_template_of
from adaptrank.data.collate import (
    IGNORED,
    Batch,
    causal_batch,
    predict_batch,
    validation_batch,
)
from adaptrank.data.documents import check_scores, encode_documents
from adaptrank.data.packed_task import PackedTask
from adaptrank.data.segments import Segment, as_int32, cut, encode_segments, token_ids
from adaptrank.data.shortening import Shortener
from adaptrank.data.task import Row, Split
from adaptrank.data.templates import chat_segments, render_chat

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)


class CompletionTask(PackedTask):
    """Prompts to complete.

    Rows have `prompt` and `completion`, or `messages`. They may have `answer`, or `choices` and
    `label`. The training is on the completion only, with the tokenizer's end token after it.
    Rows may have `text` instead: all of its tokens are trained on, in blocks of `max_length`.
    Batches are `causal_batch` in training, `validation_batch` in validation and test, and
    `predict_batch` in prediction (see `adaptrank.data.collate`).

    In a conversation, the token with which the chat template ends a turn is trained on, and a
    template without such a token gets the tokenizer's end token after the last reply.

    Args:
        chat: put the prompt into the tokenizer's chat template as the user's turn, and the
            completion as the assistant's. Rows with `messages` are always conversations.
        kwargs: `packing`, and those of `TaskData`.
    """

    def __init__(self, *, chat: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chat = chat
        # Format of the rows encoded so far: kinds (conversation or not), first system messages, ids
        # that end a completion, and a prompt to try the trained model with.
        self._kinds: set[bool] = set()
        self._systems: set[str | None] = set()
        self._end_ids_seen: set[int] = set()
        self._added: frozenset[int] | None = None
        self._first_prompt: str | None = None

    @property
    def example_prompt(self) -> str | None:
        """A prompt of the data, or in a conversation a user's message, to try the model with."""
        return self._first_prompt

    @property
    def prompt_template(self) -> str | None:
        """Format string over columns that makes the prompts, or None if rows have whole prompts."""
        return None

    def conventions(self) -> dict[str, Any]:
        assert self.tokenizer is not None
        found: dict[str, Any] = {}
        if len(self._kinds) == 1:
            found["chat"] = True in self._kinds
        if True in self._kinds and (template := chat_template_of(self.tokenizer)):
            found["chat_template"] = template
        if found.get("chat") and len(self._systems) == 1 and None not in self._systems:
            found["system"] = next(iter(self._systems))
        if self.prompt_template is not None:
            found["prompt"] = self.prompt_template
        if self._end_ids_seen:
            ends = self.tokenizer.convert_ids_to_tokens(sorted(self._end_ids_seen))
            found["stop_tokens"] = self.token_table(*ends)
        if self.tokenizer.pad_token is not None:
            found["pad_token"] = self.token_table(self.tokenizer.pad_token)
        return found

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        batches = {"train": causal_batch, "predict": predict_batch}
        return partial(batches.get(split, validation_batch), pad_id=self.pad_id)

    def predict_dataloader(self) -> "DataLoader[Row]":
        examples = self.examples("predict")
        if isinstance(examples, list) and any("prompt_ids" not in e for e in examples):
            raise UserError(
                "Plain text has no prompt to complete. Give `predict` a source of prompts."
            )
        return super().predict_dataloader()

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        documents = [row["text"] for row in rows if "text" in row]
        if documents:
            prompts = [row for row in rows if "text" not in row]
            examples = self.encode(prompts, split) if prompts else []
            return examples + self._encode_documents(documents, split, examples)
        self._look_at(rows)
        if split == "predict":
            return self._encode_prompts(rows)
        examples = self._encode_completions(rows, split)
        if split == "train":
            return examples
        for example, prompt in zip(examples, self._encode_prompts(rows), strict=True):
            example |= prompt
        if self._all_have("answer", rows, split, "exact match"):
            for example, row in zip(examples, rows, strict=True):
                example["answer"] = row["answer"]
        if self._all_have("choices", rows, split, "accuracy over choices"):
            assert self.tokenizer is not None
            shortener = Shortener(self.tokenizer, self.max_length)
            for example, row in zip(examples, rows, strict=True):
                example |= self._encode_choices(row, shortener)
        return examples

    def _all_have(self, field: str, rows: list[Row], split: Split, score: str) -> bool:
        """Tell whether all rows have a field. Warn if only some have it."""
        count = sum(field in row for row in rows)
        if 0 < count < len(rows):
            log.warning(
                "%d of %d %s rows have `%s`, so there is no %s.",
                count,
                len(rows),
                split,
                field,
                score,
            )
        return count == len(rows)

    def _look_at(self, rows: list[Row]) -> None:
        """Remember the format of the rows, for `conventions` and for a prompt to type."""
        for row in rows:
            self._kinds.add(self._is_chat(row))
            messages = row.get("messages") or []
            has_system = bool(messages) and messages[0]["role"] == "system"
            system = messages[0]["content"] if has_system else None
            self._systems.add(system if isinstance(system, str) else None)
            if self._first_prompt is None:
                asked = [message["content"] for message in messages if message["role"] == "user"]
                prompt = row.get("prompt") or (asked[0] if len(asked) == 1 else None)
                self._first_prompt = prompt if isinstance(prompt, str) else None

    def _encode_documents(self, texts: list[str], split: Split, others: list[Row]) -> list[Row]:
        """Tokenize plain text: `input_ids` and `labels`, each (L,), of each block."""
        assert self.tokenizer is not None
        check_scores(others, split)
        self._kinds.add(False)
        if self.tokenizer.eos_token_id is not None:
            self._end_ids_seen.add(self.tokenizer.eos_token_id)
        return encode_documents(self.tokenizer, texts, self.max_length)

    # ---- the text of a row

    def _is_chat(self, row: Row) -> bool:
        return self.chat or "messages" in row

    def _segments(self, row: Row) -> list[Segment]:
        """Return the text of a row as segments. The completion is trained on."""
        assert self.tokenizer is not None
        if "messages" in row:
            return chat_segments(self.tokenizer, row["messages"])
        if self.chat:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
            return chat_segments(self.tokenizer, messages)
        return [(row["prompt"], False), (row["completion"], True)]

    def _prompt(self, row: Row) -> str:
        """Return the text before the last completion, as the model is given it."""
        assert self.tokenizer is not None
        if not self._is_chat(row):
            return str(row["prompt"])
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return render_chat(self.tokenizer, messages, ask=True)

    def _indices_by_kind(self, rows: list[Row]) -> list[tuple[bool, list[int]]]:
        """Return (is_chat, indices) of the rows that are no conversations, and of those that are.

        The chat template gives a conversation its special tokens. The tokenizer gives them to other
        texts.
        """
        chats = [i for i, row in enumerate(rows) if self._is_chat(row)]
        texts = [i for i, row in enumerate(rows) if not self._is_chat(row)]
        return [(False, texts), (True, chats)]

    # ---- tokens

    def _encode_prompts(self, rows: list[Row]) -> list[Row]:
        """Tokenize prompts for generation: `prompt_ids` (L,), and the text `prompt`."""
        assert self.tokenizer is not None
        bos = self.tokenizer.bos_token_id
        shortener = Shortener(self.tokenizer, self.max_length)
        prompts = [self._prompt(row) for row in rows]
        examples: list[Row] = [{} for _ in rows]
        for is_chat, indices in self._indices_by_kind(rows):
            texts = [shortener.prompt(prompts[i], special=not is_chat) for i in indices]
            encoded = token_ids(self.tokenizer, texts, special=not is_chat)
            for i, ids in zip(indices, encoded, strict=True):
                kept, _, _ = cut(ids, [IGNORED] * len(ids), self.max_length, bos)
                prompt = rows[i].get("prompt", prompts[i])
                examples[i] = {"prompt_ids": as_int32(kept), "prompt": prompt}
        return examples

    def _encode_completions(self, rows: list[Row], split: Split) -> list[Row]:
        """Tokenize prompts with completions: `input_ids` and `labels`, each (L,)."""
        assert self.tokenizer is not None
        bos = self.tokenizer.bos_token_id
        shortener = Shortener(self.tokenizer, self.max_length)
        examples: list[Row] = [{} for _ in rows]
        cuts = {"prompt": 0, "completion": 0}
        for is_chat, indices in self._indices_by_kind(rows):
            whole = (self._segments(rows[i]) for i in indices)
            segments = [shortener.segments(row, special=not is_chat) for row in whole]
            encoded = encode_segments(self.tokenizer, segments, special=not is_chat)
            for i, (ids, labels) in zip(indices, encoded, strict=True):
                end = self._end_ids(ids if is_chat else [])
                if end or is_chat:
                    last_id = (ids + end)[-1:]
                    self._end_ids_seen |= self._added_ids().intersection(last_id)
                ids, labels, part = cut(ids + end, labels + end, self.max_length, bos)
                if part:
                    cuts[part] += 1
                examples[i] = {"input_ids": as_int32(ids), "labels": as_int32(labels)}
        self.report_cuts(
            split,
            len(rows),
            prompts_cut_from_the_left=cuts["prompt"],
            completions_cut_from_the_right=cuts["completion"],
        )
        return examples

    def _end_ids(self, conversation: list[int]) -> list[int]:
        """Return the id to append as the end in a list, or [] if there is none to append.

        Args:
            conversation: ids of a rendered conversation, or [] for another text. The chat template
                of most models has ended it already.
        """
        assert self.tokenizer is not None
        end = self.tokenizer.eos_token_id
        is_ended = bool(conversation) and conversation[-1] in self._added_ids()
        return [] if end is None or is_ended else [end]

    def _added_ids(self) -> frozenset[int]:
        """Return the ids of tokens beside the text: special tokens, and those that were added."""
        assert self.tokenizer is not None
        if self._added is None:
            added = getattr(self.tokenizer, "added_tokens_decoder", {})
            self._added = frozenset([*added, *self.tokenizer.all_special_ids])
        return self._added

    def _encode_choices(self, row: Row, shortener: Shortener) -> Row:
        """Tokenize every choice of a row, after its prompt."""
        assert self.tokenizer is not None
        special = not self._is_chat(row)
        whole = (self._choice_segments(row, choice) for choice in row["choices"])
        segments = [shortener.segments(choice, special=special) for choice in whole]
        encoded = encode_segments(self.tokenizer, segments, special=special)
        choices = []
        for text, (ids, labels) in zip(row["choices"], encoded, strict=True):
            ids, labels, _ = cut(ids, labels, self.max_length, self.tokenizer.bos_token_id)
            choices.append(
                {"input_ids": as_int32(ids), "labels": as_int32(labels), "characters": len(text)}
            )
        return {"choices": choices, "target": row["label"]}

    def _choice_segments(self, row: Row, choice: str) -> list[Segment]:
        """Return the segments of a prompt with one choice.

        No end token follows the choice, because log p(choice | prompt) is compared.
        """
        if not self._is_chat(row):
            return [(row["prompt"], False), (" " + choice, True)]
        if "messages" in row:
            turns = row["messages"]
            asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            row = {"messages": [*asked, {"role": "assistant", "content": choice}]}
        *context, (reply, _) = self._segments(row | {"completion": choice})
        end = reply.find(choice.strip()) + len(choice.strip())
        return [*((text, False) for text, _ in context), (reply[:end], True)]
